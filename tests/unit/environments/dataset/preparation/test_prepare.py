import json
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from speed_async.environments.dataset.preparation.prepare import Prepared, prepare
from speed_async.environments.dataset.preparation.sources import SOURCES
from speed_async.errors import DataError
from tests.fakes.command_line import run_command
from tests.fakes.published_files import (
    gsm8k_record,
    write_dapo,
    write_json_array,
    write_json_lines,
    write_numinamath,
)

EXAM = (
    "A cyclist rides along the river for two hours at nine miles per hour and then rests by the "
    "bridge. How far did she ride?"
)


def rows_of(prepared: Prepared) -> list[dict[str, str]]:
    return pq.read_table(prepared.folder / prepared.card["output"]["file"]).to_pylist()


def rejects_of(prepared: Prepared) -> list[tuple[int, str]]:
    lines = (prepared.folder / "rejects.jsonl").read_text().splitlines()
    return [(reject["row"], reject["reason"]) for reject in map(json.loads, lines)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_gsm8k(folder: Path, questions: Sequence[str] = ("One?", "Two?", "Three?")) -> Path:
    records = [gsm8k_record(question, f"1,00{index}") for index, question in enumerate(questions)]
    return write_json_lines(folder / "gsm8k.jsonl", records)


def test_gsm8k_becomes_prompts_and_final_answers(tmp_path: Path) -> None:
    prepared = prepare("gsm8k", path=write_gsm8k(tmp_path), out=tmp_path / "out")
    assert rows_of(prepared)[0] == {
        "prompt": "One?",
        "answer": "1000",
        "level": "",
        "source": "gsm8k",
        "id": "row-1",
    }
    assert sorted(contents(prepared.folder)) == [
        "card.json",
        "card.md",
        "rejects.jsonl",
        "train.parquet",
    ]


def test_an_evaluation_set_keeps_levels_and_ids_made_unique(tmp_path: Path) -> None:
    records = [
        {"problem": f"{n}?", "answer": 27.0, "difficulty": 5.0, "unique_id": "same"} for n in (1, 2)
    ]
    path = write_json_array(tmp_path / "math500.json", records)
    prepared = prepare("math500", path=path, out=tmp_path / "out")
    assert prepared.card["output"]["file"] == "test.parquet"
    assert [(row["answer"], row["level"], row["id"]) for row in rows_of(prepared)] == [
        ("27", "5", "same"),
        ("27", "5", "same-row-2"),
    ]


def test_each_row_of_a_file_with_a_hundred_repetitions_is_kept_once(tmp_path: Path) -> None:
    problems = [(f"What is {n} plus {n}?", str(2 * n)) for n in range(5)]
    path = write_dapo(tmp_path / "dapo.parquet", problems, repetitions=100)
    prepared = prepare("deepscaler", path=path, out=tmp_path / "out")
    assert [(row["prompt"], row["answer"]) for row in rows_of(prepared)] == problems
    assert [step["num_rows"] for step in prepared.card["steps"]] == [500, 5, 5, 5]
    assert prepared.card["instructions_removed"] == 5


def test_dapo_is_divided_into_the_same_parts_whatever_the_order(tmp_path: Path) -> None:
    problems = [(f"What is the number {n}?", str(n)) for n in range(1040)]
    path = write_dapo(tmp_path / "dapo.parquet", problems, repetitions=2)
    reversed_path = write_dapo(tmp_path / "reversed.parquet", problems[::-1], repetitions=1)
    training = prepare("dapo17k", path=path, out=tmp_path / "dapo17k")
    held_out = prepare("dapo1k", path=reversed_path, out=tmp_path / "dapo1k")
    parts = [{row["prompt"] for row in rows_of(each)} for each in (training, held_out)]
    assert [len(part) for part in parts] == [40, 1000]
    assert parts[0] | parts[1] == {problem for problem, _ in problems}
    assert training.card["held_out"] == {"part": "rest", "seed": 17, "problems": 1000}


def test_a_part_of_dapo_is_refused_when_it_has_too_few_problems(tmp_path: Path) -> None:
    path = write_dapo(tmp_path / "dapo.parquet", [("One?", "1")], repetitions=3)
    with pytest.raises(DataError, match="1 distinct usable problems: pass the whole"):
        prepare("dapo17k", path=path, out=tmp_path / "out")


def test_numinamath_is_cut_to_integer_answers_without_proofs(tmp_path: Path) -> None:
    rows = [
        ("What is six times seven?", "It is $\\boxed{42}$."),
        ("Prove that two is even.", "It is $\\boxed{2}$."),
        ("Half of one?", "It is $\\boxed{\\frac{1}{2}}$."),
        ("Who?", "Nobody."),
    ]
    path = write_numinamath(tmp_path / "numina.parquet", rows)
    prepared = prepare("numinamath", path=path, out=tmp_path / "out")
    assert [(row["answer"], row["source"]) for row in rows_of(prepared)] == [("42", "olympiads")]
    assert rejects_of(prepared) == [
        (2, "the problem asks for a proof"),
        (3, "the answer is not an integer"),
        (4, "the solution has no \\boxed{} and no ####"),
    ]


def test_rows_that_cannot_be_used_are_counted_by_reason(tmp_path: Path) -> None:
    lines = [
        '{"problem": "One?", "answer": "1"}',
        "{broken",
        '{"problem": "Two?", "answer": null}',
        '{"problem": "Three?", "answer": null}',
        '{"problem": "Three?", "answer": "3"}',
        '{"problem": "One?", "answer": "2"}',
        '{"problem": "One?", "answer": "1.0"}',
        '{"problem": "Four?", "answer": "' + "9" * 20_000 + '"}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    prepared = prepare("deepscaler", path=path, out=tmp_path / "out")
    assert [(row["prompt"], row["answer"]) for row in rows_of(prepared)] == [
        ("One?", "1"),
        ("Three?", "3"),
    ]
    assert prepared.card["rejects"] == {
        "the answer is missing": 2,
        "same problem as an earlier row, with another answer": 1,
        "the line is not valid JSON": 1,
        "the math verifier cannot use the answer": 1,
    }
    assert [number for number, _ in rejects_of(prepared)] == [2, 3, 4, 6, 8]
    assert [step["num_rows"] for step in prepared.card["steps"]] == [8, 7, 2, 2]


def test_near_duplicates_are_dropped_only_with_the_same_answer(tmp_path: Path) -> None:
    records = [
        {"problem": EXAM, "answer": 18},
        {"problem": EXAM.upper(), "answer": 18},
        {"problem": EXAM + " Say", "answer": 19},
    ]
    path = write_json_array(tmp_path / "rows.json", records)
    prepared = prepare("deepscaler", path=path, out=tmp_path / "out")
    assert [row["answer"] for row in rows_of(prepared)] == ["18", "19"]
    assert rejects_of(prepared) == [(2, "near duplicate of an earlier row, with the same answer")]
    near = prepared.card["near_duplicates"]
    assert (near["dropped"], near["same_answer"], near["other_answer"]) == (True, 1, 1)


def test_overlap_with_evaluation_sets_is_reported_and_on_request_removed(tmp_path: Path) -> None:
    suite = write_json_array(tmp_path / "s.json", [{"problem": EXAM, "answer": 18, "id": 60}])
    prepare("aime24", path=suite, out=tmp_path / "data" / "aime24")
    path = write_gsm8k(tmp_path, ["One?", EXAM.lower(), "Note: " + EXAM])
    out = tmp_path / "data" / "gsm8k"

    reported = prepare("gsm8k", path=path, out=out)
    assert len(rows_of(reported)) == 3
    [overlap] = reported.card["contamination"]
    kinds = ("removed", "same_text", "half", "passage", "problems")
    assert [overlap[kind] for kind in kinds] == [False, 1, 1, 0, 1]

    removed = prepare("gsm8k", path=path, out=out, decontaminate=["aime24"])
    assert [row["prompt"] for row in rows_of(removed)] == ["One?"]
    reason = "overlaps with an evaluation set"
    assert rejects_of(removed) == [(2, reason), (3, reason)]


def test_a_second_preparation_changes_nothing(tmp_path: Path) -> None:
    path, out = write_gsm8k(tmp_path), tmp_path / "out"
    first = prepare("gsm8k", path=path, out=out)
    assert not first.up_to_date
    before = out.stat().st_mtime_ns, out.stat().st_ino, contents(out)
    second = prepare("gsm8k", path=path, out=out)
    assert second.up_to_date and second.card == first.card
    assert (out.stat().st_mtime_ns, out.stat().st_ino, contents(out)) == before


def test_a_changed_input_or_output_is_prepared_again_to_equal_bytes(tmp_path: Path) -> None:
    path, out = write_gsm8k(tmp_path), tmp_path / "out"
    prepare("gsm8k", path=path, out=out)
    before = contents(out)
    (out / "train.parquet").write_bytes(before["train.parquet"][:-100])
    assert not prepare("gsm8k", path=path, out=out).up_to_date
    assert contents(out) == before
    write_gsm8k(tmp_path, ["Other?", "Two?"])
    assert [row["prompt"] for row in rows_of(prepare("gsm8k", path=path, out=out))] == [
        "Other?",
        "Two?",
    ]


def test_a_new_evaluation_set_beside_it_makes_a_training_set_out_of_date(tmp_path: Path) -> None:
    path, out = write_gsm8k(tmp_path), tmp_path / "gsm8k"
    prepare("gsm8k", path=path, out=out)
    prepare("gsm8k-test", path=path, out=tmp_path / "gsm8k-test")
    prepared = prepare("gsm8k", path=path, out=out)
    assert not prepared.up_to_date
    assert [each["same_text"] for each in prepared.card["contamination"]] == [3]


def test_a_folder_that_holds_anything_else_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(DataError, match="is not a prepared data set"):
        prepare("gsm8k", path=write_gsm8k(tmp_path), out=out)
    assert sorted(contents(out)) == ["thesis.tex"]


def test_a_data_set_of_the_hub_is_prepared_from_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / SOURCES["math"].hub  # `datasets` prefers a folder of this name to the hub
    copy.mkdir(parents=True)
    records = [{"problem": "Two?", "level": "Level 2", "solution": "$\\boxed{2}$"}]
    write_json_lines(copy / "train.jsonl", records)
    prepared = prepare("math", path=None, out=None)
    assert prepared.folder == tmp_path / "data" / "math"
    assert [(row["answer"], row["level"]) for row in rows_of(prepared)] == [("2", "2")]
    assert prepared.card["input"]["description"] == SOURCES["math"].hub


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gsm9k", {}, r"NAME = 'gsm9k': unknown data set \(did you mean gsm8k\?\)"),
        ("gsm8k", {"decontaminate": ["aime24"]}, "--decontaminate = 'aime24': neither"),
        ("aime24", {"decontaminate": ["aime25"]}, "'aime24' is an evaluation set: omit it"),
    ],
)
def test_an_unusable_option_is_refused(
    name: str, options: dict[str, list[str]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(name, path=write_gsm8k(tmp_path), out=tmp_path / "out", **options)


def test_a_file_without_a_usable_row_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_json_array(tmp_path / "rows.json", [{"problem": "One?", "answer": None}])
    with pytest.raises(DataError, match="1: the answer is missing"):
        prepare("math", path=path, out=tmp_path / "data" / "out")
    assert not list((tmp_path / "data").iterdir())


def test_the_command_prints_the_counts_of_each_step(tmp_path: Path) -> None:
    path, out = write_gsm8k(tmp_path, ["One?", "Two?"]), tmp_path / "out"
    command = ("data", "prepare", "gsm8k", "--from", path.name, "--out", "out")
    status, printed, progress = run_command(tmp_path, *command)
    assert (status, progress) == (0, "")
    assert printed.splitlines()[1].split() == ["0", "2", "rows", "read"]
    assert printed.endswith(f"wrote {out} (2 rows; see card.md)\n")
    card = (out / "card.md").read_text()
    assert "    One?\n\n    answer: 1000\n" in card and " ".join(command) in card
    assert run_command(tmp_path, *command)[1] == f"{out} is up to date (2 rows)\n"


def test_a_data_set_that_the_hub_does_not_give_needs_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    status, _, error = run_command(tmp_path, "data", "prepare", "gsm8k")
    assert status != 0
    assert "'openai/gsm8k'" in error and "pass --from FILE" in error


def test_the_help_lists_every_data_set(tmp_path: Path) -> None:
    _, text, _ = run_command(tmp_path, "data", "prepare", "--help")
    training, _, evaluation = " ".join(text.split()).partition("For evaluation: ")
    for name, source in SOURCES.items():
        part = training if source.role == "training" else evaluation
        assert re.search(rf"\b{name}[,.]", part), name
