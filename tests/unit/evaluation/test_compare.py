"""Paired comparison of two folders of results."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from speed_async.errors import DataError, SpeedAsyncError
from speed_async.evaluation.compare import compare, comparison_table
from speed_async.evaluation.records import SampleFile, SampleRecord, samples_path
from speed_async.evaluation.results import summarize
from speed_async.evaluation.results_file import write_result

SETTINGS = {"suite_digest": "d", "match": "math", "verifier": "v", "temperature": 1.0}


def record(prompt_id: int, sample: int, passed: bool, **changes: object) -> SampleRecord:
    made = SampleRecord(
        prompt_id=prompt_id,
        sample=sample,
        level="",
        num_tokens=3,
        finish_reason="stop",
        outcome="scored",
        reward=float(passed),
        passed=passed,
        extracted="7" if passed else "8",
        answer="7",
        text="...",
    )
    return replace(made, **changes)


def evaluated(
    folder: Path,
    passed: list[list[bool]],
    suite: str = "s",
    num_prompts: int | None = None,
    **settings,
) -> Path:
    """A folder with the results of these samples by prompt."""
    records = [record(i, j, one) for i, row in enumerate(passed) for j, one in enumerate(row)]
    all_settings = SETTINGS | settings
    with SampleFile(samples_path(folder, suite), all_settings) as file:
        for each in records:
            file.append(each)
    result = summarize(
        suite,
        records,
        num_prompts=num_prompts or len(passed),
        num_samples=len(passed[0]),
        match="math",
    )
    write_result(folder, result, all_settings)
    return folder


def test_what_is_hard_for_both_models_cancels(tmp_path: Path) -> None:
    """The second model solves 4 more of 40 prompts, and none less."""
    first = evaluated(tmp_path / "a", [[i < 20] for i in range(40)])
    second = evaluated(tmp_path / "b", [[i < 24] for i in range(40)])
    [suite] = compare(first, second).suites
    assert suite.means == (0.5, 0.6)
    assert suite.difference.value == pytest.approx(0.1)
    # The difference is 1 with probability 0.1: its standard error is sqrt(0.1 * 0.9 / 40) = 0.047,
    # where unpaired prompts would give 0.111.
    assert suite.difference.half_width == pytest.approx(1.96 * 0.047, rel=0.2)
    assert suite.difference.low >= 0
    assert compare(second, first).suites[0].difference.value == pytest.approx(-0.1)


def test_majorities_are_compared_when_both_have_as_many_samples(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "a", [[True, False, False], [True, True, False]])
    second = evaluated(tmp_path / "b", [[True, True, False], [True, True, True]])
    one = evaluated(tmp_path / "c", [[True], [True]])
    [suite] = compare(first, second).suites
    assert suite.majority_difference is not None
    assert suite.majority_difference.value == pytest.approx(0.5)
    assert compare(first, one).suites[0].majority_difference is None


def test_suites_have_equal_weight_in_the_whole(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "a", [[False]] * 10)
    evaluated(tmp_path / "a", [[False]] * 2, suite="t")
    second = evaluated(tmp_path / "b", [[i < 4] for i in range(10)])
    evaluated(tmp_path / "b", [[True]] * 2, suite="t")
    comparison = compare(first, second)
    assert comparison.overall.value == pytest.approx((0.4 + 1.0) / 2)
    console = Console(width=100, record=True)
    console.print(comparison_table(comparison))
    text = console.export_text()
    assert "+40.0 [+10.0, +70.0]" in text and "mean of suites" in text


def test_prompts_without_a_verdict_are_left_out_of_both(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "a", [[True], [False], [True]])
    second = tmp_path / "b"
    records = [record(0, 0, True), record(1, 0, True)]
    records.append(record(2, 0, False, outcome="timeout", reward=None, extracted=None))
    with SampleFile(samples_path(second, "s"), SETTINGS) as file:
        for each in records:
            file.append(each)
    result = summarize("s", records, num_prompts=3, num_samples=1, match="math")
    write_result(second, result, SETTINGS)
    [suite] = compare(first, second).suites
    assert (suite.num_prompts, suite.means) == (2, (0.5, 1.0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"suite_digest": "other"}, "prompts or answers are not the same"),
        ({"verifier": "other"}, "scoring code is not the same"),
        ({"match": "exact"}, "matched in different ways"),
    ],
)
def test_unequal_prompts_or_scoring_are_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    first = evaluated(tmp_path / "a", [[True], [False]])
    second = evaluated(tmp_path / "b", [[True], [False]], **changes)
    with pytest.raises(SpeedAsyncError, match=f"'s' cannot be compared: .*{reason}"):
        compare(first, second)


def test_unequal_suites_are_refused_unless_some_are_selected(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "a", [[True], [False]])
    second = evaluated(tmp_path / "b", [[True], [True]])
    evaluated(second, [[True]], suite="t")
    with pytest.raises(SpeedAsyncError, match=r"has s, '.*b' has s, t; .* --suite s$"):
        compare(first, second)
    assert [each.suite for each in compare(first, second, ["s"]).suites] == ["s"]
    with pytest.raises(SpeedAsyncError, match=r"--suite t: '.*a' has no such suite; it has s"):
        compare(first, second, ["t"])


def test_an_unfinished_evaluation_is_refused(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "a", [[True], [False]])
    second = evaluated(tmp_path / "b", [[True]], num_prompts=2)
    with pytest.raises(SpeedAsyncError, match=r"in '.*b' is incomplete"):
        compare(first, second)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no results.json"):
        compare(first, tmp_path / "empty")


def test_a_run_folder_is_refused_with_the_names_of_its_evaluations(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "run" / "evaluation" / "version-000020", [[True], [False]])
    with pytest.raises(DataError, match=f"give an evaluation of this run: {re.escape(str(first))}"):
        compare(first, tmp_path / "run")


def test_other_differences_in_settings_are_shown(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "a", [[True], [False]])
    second = evaluated(tmp_path / "b", [[True], [True]], temperature=0.0)
    assert compare(first, second).notes == ("s: temperature is 1.0 for A and 0.0 for B",)
