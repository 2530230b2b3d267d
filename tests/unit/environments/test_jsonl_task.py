"""The jsonl task: reading, splitting and matching with real files."""

import json
import os
from pathlib import Path

import pytest

from speed_async.environments.jsonl import JsonlTask
from speed_async.environments.task import data_fingerprint
from speed_async.errors import ConfigError, DataError


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def numbered(path: Path, num_rows: int) -> str:
    return write(path, *({"prompt": f"{i} + 0 =", "answer": i} for i in range(num_rows)))


def load(path: str, match: str = "exact", num_held_out: int = 1, seed: int = 0) -> JsonlTask:
    assert match in ("exact", "numeric")
    return JsonlTask(path=path, match=match, num_held_out=num_held_out, seed=seed)


def fault(path: str, match: str = "exact") -> str:
    with pytest.raises(DataError) as caught:
        load(path, match)
    return str(caught.value)


def test_rows_become_prompts_with_level_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"p{i}", "answer": answer, "level": 2, "source": ["a"]}
        for i, answer in enumerate(["x", 3, 2.5])
    ]
    task = load(write(path, *rows))
    prompts = sorted([*task.train_prompts, *task.held_out_prompts], key=lambda p: p.text)
    assert [prompt.text for prompt in prompts] == ["p0", "p1", "p2"]
    assert [prompt.answer for prompt in prompts] == ["x", "3", "2.5"]
    assert {prompt.level for prompt in prompts} == {"2"}
    assert prompts[0].metadata == {"level": 2, "source": ["a"]}


def test_prompt_ids_start_at_zero_in_both_splits(tmp_path: Path) -> None:
    task = load(numbered(tmp_path / "data.jsonl", 10), num_held_out=4)
    assert [prompt.prompt_id for prompt in task.train_prompts] == list(range(6))
    assert [prompt.prompt_id for prompt in task.held_out_prompts] == list(range(4))
    assert not any(prompt.held_out for prompt in task.train_prompts)
    assert all(prompt.held_out for prompt in task.held_out_prompts)


def test_split_depends_on_seed_and_contains_every_prompt(tmp_path: Path) -> None:
    path = numbered(tmp_path / "data.jsonl", 40)
    one, again, other = (load(path, num_held_out=10, seed=seed) for seed in (1, 1, 2))
    assert data_fingerprint(one, {}) == data_fingerprint(again, {}) != data_fingerprint(other, {})
    texts = {p.text for p in one.train_prompts} | {p.text for p in one.held_out_prompts}
    assert texts == {f"{i} + 0 =" for i in range(40)}


def test_repeated_prompts_are_read_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "answer": "1"} for i in range(6)]
    spaced = [{"prompt": f" q{i}\n", "answer": "1"} for i in range(6)]
    task = load(write(tmp_path / "data.jsonl", *rows, *rows, *spaced), num_held_out=3)
    train = {prompt.text.strip() for prompt in task.train_prompts}
    held_out = {prompt.text.strip() for prompt in task.held_out_prompts}
    assert len(train) == len(task.train_prompts) == 3
    assert len(held_out) == len(task.held_out_prompts) == 3
    assert not train & held_out


def test_blank_lines_and_a_byte_order_mark_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": f"é{i}", "answer": "ü"}, ensure_ascii=False) for i in range(3)]
    path.write_bytes(b"\xef\xbb\xbf\n" + "\n\n  \r\n".join(lines).encode())
    task = load(str(path))
    assert len(task.train_prompts) + len(task.held_out_prompts) == 3


def test_exact_match_compares_final_answers(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "answer": " blue sky "} for i in range(3)]
    task = load(write(tmp_path / "data.jsonl", *rows))
    prompt = task.train_prompts[0]
    good = ["blue sky", " blue sky\n", r"it is \boxed{blue sky}", "because\n#### blue sky"]
    bad = ["Blue sky", "the blue sky", r"blue sky \boxed{red}", "", r"\boxed{blue sky} \boxed{}"]
    assert [task.score(prompt, completion) for completion in good] == [1.0] * 4
    assert [task.score(prompt, completion) for completion in bad] == [0.0] * 5


def test_numeric_match_compares_last_numbers(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "answer": "work: 3 * 6 = 18\n#### 1,800"},
        {"prompt": "b", "answer": "1800"},
        {"prompt": "c", "answer": 1800.0},
    ]
    task = load(write(tmp_path / "data.jsonl", *rows), match="numeric")
    for prompt in (*task.train_prompts, *task.held_out_prompts):
        good = ["1800", "so 2 + 2 gives 1,800.", r"\boxed{1.8e3}", "7 #### 1800", "3600/2"]
        bad = ["1801", "1800 or 7", r"1800 \boxed{18}", "", "none", "1799 + 1"]
        assert [task.score(prompt, completion) for completion in good] == [1.0] * 5
        assert [task.score(prompt, completion) for completion in bad] == [0.0] * 6


def test_bad_lines_are_reported_with_line_number_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = b'{"prompt": "p", "answer": "1"}\n'
    cases: list[tuple[bytes, str]] = [
        (b"{oops\n", "not valid JSON"),
        (b'["p", "1"]\n', "not a JSON object but a list"),
        (b'{"answer": "1"}\n', "key 'prompt' is missing"),
        (b'{"prompt": "q"}\n', "key 'answer' is missing"),
        (
            b'{"question": "q", "answer": "1"}\n',
            "key 'prompt' is missing; the keys of this line are: 'question', 'answer'",
        ),
        (b'{"prompt": 3, "answer": "1"}\n', "'prompt' must be a non-blank string, not 3"),
        (b'{"prompt": " ", "answer": "1"}\n', "'prompt' must be a non-blank string"),
        (b'{"prompt": "q", "answer": true}\n', "'answer' must be a number"),
        (b'{"prompt": "q", "answer": null}\n', "'answer' must be a number"),
        (b'{"prompt": "q", "answer": NaN}\n', "'answer' must be a number"),
        (b'{"prompt": "q", "answer": Infinity}\n', "'answer' must be a number"),
        (b'{"prompt": "q", "answer": -1e999}\n', "'answer' must be a number"),
        (b'{"prompt": "q\\ud800", "answer": "1"}\n', "'prompt' contains a lone surrogate"),
        (b'{"prompt": "q", "answer": "\\udfff"}\n', "'answer' contains a lone surrogate"),
        (b'{"prompt": "q", "answer": ""}\n', "'answer' must be a number or a non-blank string"),
        (b'{"prompt": "\xff", "answer": "1"}\n', "not UTF-8 (byte 13)"),
        (b"[" * 100_000 + b"\n", "not valid JSON"),
        (
            b'{"prompt": " p", "answer": "2"}\n',
            "same prompt as line 1 with a different answer: '2'",
        ),
    ]
    for raw, text in cases:
        path.write_bytes(good + b"\n" + raw + good)
        message = fault(str(path))
        assert f"line 3: {text}" in message
        assert str(path) in message
        assert "1 unusable line:" in message
        assert "Correct or remove them" in message


def test_at_most_five_bad_lines_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("bad\n" * 7)
    message = fault(str(path))
    assert "7 unusable lines" in message
    assert "line 5:" in message
    assert "line 6:" not in message
    assert "and 2 more" in message


def test_non_numeric_answer_is_rejected_with_numeric_match_only(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"p{i}", "answer": answer} for i, answer in enumerate(["1", "2", "blue"])]
    path = write(tmp_path / "data.jsonl", *rows)
    message = fault(path, match="numeric")
    assert "line 3: 'answer' 'blue' is not one whole number" in message
    assert "task.match = 'exact'" in message
    assert len(load(path).train_prompts) == 2


@pytest.mark.parametrize("answer", ["(15,-29)", r"11\\sqrt2", r"-\\frac{\\pi}{6}", "52_8", "x=5"])
def test_ground_truth_with_an_embedded_number_is_rejected(tmp_path: Path, answer: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"prompt": "p", "answer": "1"}\n{"prompt": "q", "answer": "2"}\n'
        f'{{"prompt": "r", "answer": "{answer}"}}\n{{"prompt": "s", "answer": "3"}}\n'
    )
    message = fault(str(path), match="numeric")
    assert "line 3" in message and "is not one whole number" in message


@pytest.mark.parametrize("match", ["exact", "numeric"])
@pytest.mark.parametrize("answer", ["3 * 6 = 18\n####", "#### ", r"it is \boxed{}", r"\boxed{ }"])
def test_empty_final_answer_is_rejected(tmp_path: Path, match: str, answer: str) -> None:
    rows = [{"prompt": f"p{i}", "answer": each} for i, each in enumerate(["1", answer, "2", "3"])]
    message = fault(write(tmp_path / "data.jsonl", *rows), match=match)
    assert "line 2: 'answer'" in message
    assert "has an empty final answer: add one or remove the row" in message


@pytest.mark.parametrize("match", ["exact", "numeric"])
def test_empty_completion_gets_zero_reward(tmp_path: Path, match: str) -> None:
    task = load(numbered(tmp_path / "data.jsonl", 3), match=match)
    for completion in ("", " \n", "####", r"\boxed{}"):
        assert task.score(task.train_prompts[0], completion) == 0.0


def test_json_numbers_are_converted_to_answers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    numbers = ["18.0", "18", "-0.0", "2.5", "1e3", "1e22", "-7.0", "1" + "0" * 400]
    path.write_text(
        "".join(f'{{"prompt": "p{i:02}", "answer": {n}}}\n' for i, n in enumerate(numbers))
    )
    task = load(str(path))
    prompts = sorted([*task.train_prompts, *task.held_out_prompts], key=lambda p: p.text)
    answers = ["18", "18", "0", "2.5", "1000", "1e+22", "-7", "1" + "0" * 400]
    assert [prompt.answer for prompt in prompts] == answers


def test_missing_empty_or_unreadable_file_raises_with_a_remedy(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.jsonl")
    assert fault(missing) == f"data file '{missing}' does not exist: correct task.path"
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    assert "is empty: write one object per line" in fault(str(empty))
    assert "cannot be read (Is a directory)" in fault(str(tmp_path))


def test_file_too_small_for_the_split_raises(tmp_path: Path) -> None:
    two = numbered(tmp_path / "two.jsonl", 2)
    assert "has 2 distinct prompts: at least 3 are required" in fault(two)
    ten = numbered(tmp_path / "ten.jsonl", 10)
    assert len(load(ten, num_held_out=8).train_prompts) == 2
    with pytest.raises(ConfigError) as caught:
        load(ten, num_held_out=9)
    assert caught.value.field == "task.num_held_out"
    assert "10 distinct prompts; set it to 8 or less" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x1f\x8b\x08\x00", "compressed with gzip"),
        (b"PAR1\x15\x00", "a parquet file"),
        ('{"prompt": "1+1=", "answer": "2"}'.encode("utf-16"), "UTF-16 text"),
        (b'[{"prompt": "1+1=", "answer": "2"}]', "indicates a JSON array"),
    ],
)
def test_unsupported_file_formats_are_identified(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=kind):
        JsonlTask(path=str(path), match="exact", num_held_out=1, seed=0)


def test_pipe_is_rejected_without_blocking(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(DataError, match="is a pipe or a device"):
        JsonlTask(path=str(path), match="exact", num_held_out=1, seed=0)
