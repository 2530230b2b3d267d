"""Results of a suite against hand-computed numbers, and the table."""

import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from speed_async.evaluation.records import SampleRecord
from speed_async.evaluation.results import summarize
from speed_async.evaluation.table import ModelResults, results_table


def sample(prompt_id: int, index: int, extracted: str | None, **changes: object) -> SampleRecord:
    """A sample of a prompt whose answer is 7."""
    passed = extracted == "7"
    made = SampleRecord(
        prompt_id=prompt_id,
        sample=index,
        level=f"level={10 - prompt_id}",
        num_tokens=10 * (index + 1),
        finish_reason="stop",
        outcome="scored",
        reward=float(passed),
        passed=passed,
        extracted=extracted,
        answer="7",
        text="",
    )
    return replace(made, **changes)


UNSCORED = {"outcome": "timeout", "reward": None, "passed": False}
SAMPLES = [
    *(sample(0, 0, "7"), sample(0, 1, "7.0", reward=1.0, passed=True), sample(0, 2, "8")),
    *(sample(1, 0, "8"), sample(1, 1, "7"), sample(1, 2, None, finish_reason="length")),
    *(sample(2, 0, "9"), sample(2, 1, "7"), sample(2, 2, None, **UNSCORED)),
]


def result():
    return summarize("s", SAMPLES, num_prompts=3, num_samples=3, match="math")


def test_accuracies_match_hand_computed_numbers() -> None:
    found = result()
    assert found.mean.value == pytest.approx((2 / 3 + 1 / 3 + 1 / 2) / 3)
    assert found.pass_at[1].value == pytest.approx(found.mean.value)
    # C(1, 2) = 0 of C(3, 2); C(2, 2) = 1 of 3; C(1, 2) = 0 of 1
    assert found.pass_at[2].value == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert found.pass_at[3].value == 1.0 and found.pass_at[3].num_prompts == 2
    # 7 and 7.0 vote together; 8 and 7 tie; 9 and 7 tie
    assert found.majority.value == pytest.approx((1 + 0.5 + 0.5) / 3) and found.num_ties == 2


def test_completions_without_a_verdict_are_counted_apart() -> None:
    found = result()
    assert found.outcomes == {"scored": 8, "timeout": 1} and found.num_unscored == 1
    assert found.mean_if_unscored_failed == pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3)
    assert found.mean_if_unscored_passed == pytest.approx((2 / 3 + 1 / 3 + 2 / 3) / 3)
    assert found.tokens.mean_unscored == 30
    only = summarize("s", [SAMPLES[-1]], num_prompts=1, num_samples=3, match="math")
    assert math.isnan(only.mean.value) and only.as_json()["mean"]["value"] is None
    json.dumps(only.as_json(), allow_nan=False)


def test_lengths_truncation_and_format_are_shares_of_completions() -> None:
    found = result()
    assert found.tokens.mean == 20 and found.tokens.max == 30 and found.tokens.median == 20
    assert found.tokens.mean_passed == pytest.approx((10 + 20 + 20 + 20) / 4)
    assert found.truncated == pytest.approx(1 / 9)
    assert found.answered == pytest.approx(7 / 8)


def test_levels_are_ordered_by_their_number() -> None:
    found = result()
    assert [each.level for each in found.levels] == ["level=8", "level=9", "level=10"]
    assert [each.mean.value for each in found.levels] == pytest.approx([1 / 2, 1 / 3, 2 / 3])
    one = [replace(each, level="x") for each in SAMPLES]
    assert summarize("s", one, num_prompts=3, num_samples=3, match="math").levels == ()


def test_samples_beyond_k_are_ignored() -> None:
    found = summarize("s", SAMPLES, num_prompts=3, num_samples=1, match="math")
    assert found.mean.value == pytest.approx(1 / 3) and found.is_complete
    assert list(found.pass_at) == [1]
    assert not summarize("s", SAMPLES[:-1], num_prompts=3, num_samples=3, match="math").is_complete


def test_the_table_states_ties_and_missing_verdicts() -> None:
    console = Console(width=120, record=True)
    console.print(results_table([ModelResults(name="", suites=(result(),))]))
    text = console.export_text()
    assert "3 x 3" in text and "50.0 \u00b116.7" in text
    assert "1 completions without a verdict (1 timeout) are left out; mean@3 is 44.4 if" in text
    assert "maj@3 has 2 ties" in text and "level=10" in text
