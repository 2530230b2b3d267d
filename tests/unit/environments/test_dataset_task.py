"""The `dataset` task: sources, formats, mixtures and the memory-mapped rows."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speed_async.config.sections.sources import TaskSource
from speed_async.environments.dataset.rows import open_source
from speed_async.environments.dataset.task import DatasetTask
from speed_async.environments.task import data_fingerprint
from speed_async.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "speed_async"


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(path: Path, num: int, name: str = "q") -> str:
    return lines(path, [{"problem": f"{name}{i}", "answer": i} for i in range(num)])


def load(*sources: TaskSource, num_held_out: int = 1, seed: int = 0) -> DatasetTask:
    return DatasetTask(sources, match="math", num_held_out=num_held_out, seed=seed)


def test_a_format_replaces_columns_and_keeps_the_braces_of_latex(tmp_path: Path) -> None:
    rows = [
        {
            "question": rf"Is $\frac{{1}}{{{i}}}$ {{prompt}} small?",
            "answer": f"... #### {i}",
            "id": i,
        }
        for i in range(1, 5)
    ]
    text = "{prompt} ({id}, { unknown })\nPut it in \\boxed{x}, as x^{n} or \\frac{a}{b}."
    task = load(TaskSource(path=lines(tmp_path / "a.jsonl", rows), format=text))
    prompts = sorted([*task.train_prompts, *task.held_out_prompts], key=lambda p: p.text)
    assert prompts[0].text == (
        "Is $\\frac{1}{1}$ {prompt} small? (1, { unknown })\n"
        "Put it in \\boxed{x}, as x^{n} or \\frac{a}{b}."
    )
    assert [prompt.answer for prompt in prompts] == ["1", "2", "3", "4"]
    assert task.score(prompts[1], "so \\boxed{2}") == 1.0
    assert task.score(prompts[1], "so \\boxed{3}") == 0.0


def test_an_unknown_name_in_a_format_is_refused_with_the_columns(tmp_path: Path) -> None:
    path = questions(tmp_path / "a.jsonl", 4)
    for text in ("{promt}", "{prompt} {hint}", "{prompt}{hint}"):
        with pytest.raises(DataError, match=r"neither \{prompt\} nor .*\('problem', 'answer'\)"):
            load(TaskSource(path=path, format=text))


def test_a_row_without_a_value_that_the_format_names_is_left_out(tmp_path: Path) -> None:
    rows = [{"problem": f"q{i}", "answer": i, "hint": "even" if i % 2 else None} for i in range(6)]
    path = lines(tmp_path / "a.jsonl", rows)
    source = TaskSource(path=path, format="{prompt} ({hint})")
    assert [row.prompt for row in open_source(source)] == ["q1 (even)", "q3 (even)", "q5 (even)"]
    assert open_source(source).report.unusable == {"column 'hint' of the format has no value": 3}


def test_a_prepared_folder_has_levels_and_metadata(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["a", "b", "c"],
            "answer": ["1", "2", "3"],
            "level": ["4", "5", ""],
            "source": ["x", "y", "z"],
            "id": ["i", "j", "k"],
        }
    )
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "train.parquet")
    (tmp_path / "data" / "card.json").write_text("{}")
    task = load(TaskSource(path=str(tmp_path / "data")))
    found = {p.text: p for p in (*task.train_prompts, *task.held_out_prompts)}
    assert (found["a"].level, found["c"].level) == ("4", "")
    assert found["b"].metadata == {"source": "y", "id": "j"}
    with pytest.raises(DataError, match=r"split 'test' .*train\.parquet"):
        load(TaskSource(path=str(tmp_path / "data"), split="test"))


def test_columns_can_be_named_and_others_become_metadata(tmp_path: Path) -> None:
    rows = [{"q": {"text": f"q{i}"}, "a": i, "answer": "other", "year": 1980 + i} for i in range(4)]
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    columns = {"prompt": "q.text", "answer": "a", "when": "year"}
    task = load(TaskSource(path=str(path), columns=columns))
    for prompt in task.train_prompts:
        assert prompt.text == f"q{prompt.answer}"
        assert prompt.metadata == {"when": 1980 + int(prompt.answer)}
    with pytest.raises(DataError, match="'wen'"):
        load(TaskSource(path=str(path), columns=columns | {"when": "wen"}))


def test_prompts_are_numbered_and_held_out_ones_are_disjoint(tmp_path: Path) -> None:
    source = TaskSource(path=questions(tmp_path / "a.jsonl", 20))
    task = load(source, num_held_out=5)
    train, held_out = task.train_prompts, task.held_out_prompts
    assert [p.prompt_id for p in train] == list(range(15))
    assert [p.prompt_id for p in held_out] == list(range(5))
    assert {p.held_out for p in held_out} == {True}
    assert {p.text for p in (*train, *held_out)} == {f"q{i}" for i in range(20)}
    assert [p.prompt_id for p in train[2:9:3]] == [2, 5, 8]
    assert train[-1] == train[14]
    with pytest.raises(IndexError):
        train[15]
    other = load(source, num_held_out=5, seed=1)
    assert [p.text for p in other.held_out_prompts] != [p.text for p in held_out]
    with pytest.raises(ConfigError, match="20 distinct prompts; set it to 18 or less"):
        load(source, num_held_out=19)


def test_each_source_has_its_share_and_each_prompt_occurs(tmp_path: Path) -> None:
    small = TaskSource(path=questions(tmp_path / "s.jsonl", 11, "s"), weight=1)
    large = TaskSource(path=questions(tmp_path / "l.jsonl", 44, "l"), weight=1)
    task = load(small, large, num_held_out=8)
    assert Counter(p.text[0] for p in task.held_out_prompts) == {"s": 4, "l": 4}
    # 40 of the large source remain, so 40 of the small one: its 7 prompts occur 5 or 6 times.
    counts = Counter(p.text for p in task.train_prompts)
    assert sum(n for text, n in counts.items() if text.startswith("s")) == 40
    assert sorted(n for text, n in counts.items() if text.startswith("s")) == [5, 5, 6, 6, 6, 6, 6]
    assert [n for text, n in counts.items() if text.startswith("l")] == [1] * 40
    held_out = {p.text for p in task.held_out_prompts}
    assert not held_out & counts.keys()
    with pytest.raises(ConfigError, match="raise the weight of that source"):
        load(small, large.model_copy(update={"weight": 0.01}), num_held_out=0)


def test_without_weights_each_distinct_prompt_is_used_once(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one", "answer": "1"},
        {"prompt": " one ", "answer": "1"},
        {"prompt": "two", "answer": "2"},
        {"prompt": "two", "answer": "3"},
    ]
    first = TaskSource(path=lines(tmp_path / "a.jsonl", rows))
    more = [{"prompt": "one", "answer": "1"}, {"prompt": "three", "answer": "3"}]
    second = TaskSource(path=lines(tmp_path / "b.jsonl", more))
    task = load(first, second, num_held_out=0)
    assert [(p.text, p.answer) for p in task.train_prompts] == [
        ("one", "1"),
        ("two", "2"),
        ("three", "3"),
    ]
    assert task.warnings == [
        "1 rows repeat a prompt with another answer: the first row of each prompt is used"
    ]
    assert "2 repeated prompts are used once" in task.notes


def test_unusable_rows_are_counted_by_reason(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"q{i}", "answer": i} for i in range(7)]
    rows += [{"prompt": "x", "answer": None}, {"prompt": "y", "answer": None}, {"prompt": " "}]
    task = load(TaskSource(path=lines(tmp_path / "a.jsonl", rows)))
    [warning] = task.warnings
    assert "7 of 10 rows are usable (2: the answer is missing; 1: the prompt is" in warning
    assert warning.endswith("the first is row 8: the answer is missing")
    path = lines(tmp_path / "b.jsonl", rows[-3:] + rows[:2])
    with pytest.raises(DataError, match="3 of 5 rows cannot be used, more than 50%") as error:
        load(TaskSource(path=path))
    assert "row 1: the answer is missing" in str(error.value)


def test_rows_are_written_once_until_the_source_changes(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    source = TaskSource(path=questions(path, 5))
    with ThreadPoolExecutor(4) as threads:
        opened = list(threads.map(lambda _: open_source(source), range(4)))
    [file] = cache.glob("*.arrow")
    assert {rows.file for rows in opened} == {file}
    assert [row.prompt for row in opened[3]] == [f"q{i}" for i in range(5)]
    written = file.stat().st_ino
    assert open_source(source.model_copy(update={"weight": 2.0})).file == file
    assert file.stat().st_ino == written
    questions(path, 6)
    assert len(open_source(source)) == 6
    assert len(list(cache.glob("*.arrow"))) == 2
    assert not list(cache.glob("*.part"))


def test_the_fingerprint_depends_on_content_and_not_on_location(tmp_path: Path) -> None:
    def task(name: str, answer: int) -> DatasetTask:
        rows = [{"prompt": f"q{i}", "answer": i} for i in range(4)]
        rows.append({"prompt": "last", "answer": answer})
        return load(TaskSource(path=lines(tmp_path / name, rows)))

    one, moved, other = task("a.jsonl", 1), task("b.jsonl", 1), task("c.jsonl", 2)
    assert data_fingerprint(one, {}) == data_fingerprint(moved, {}) != data_fingerprint(other, {})
    assert one.content == moved.content
    assert one.content.prompts == other.content.prompts
    assert one.content.answers != other.content.answers


def test_an_unwritable_cache_names_the_variable(tmp_path: Path, cache: Path) -> None:
    cache.parent.write_text("a file")
    with pytest.raises(DataError, match="HF_DATASETS_CACHE"):
        load(TaskSource(path=questions(tmp_path / "a.jsonl", 5)))


HUB = """
import json, os, shutil, sys
from pathlib import Path
import datasets
from speed_async.config.sections.sources import TaskSource
from speed_async.environments.dataset.rows import open_source
cache = Path(os.environ["HF_DATASETS_CACHE"])
made = datasets.load_dataset("json", data_files=sys.argv[1], split="train")
copy = cache / "org___name" / "default" / "0.0.0" / "abc"
shutil.copytree(Path(made.cache_files[0]["filename"]).parent, copy)
(copy / "json-train.arrow").rename(copy / "name-train.arrow")
facts = json.loads((copy / "dataset_info.json").read_text())
(copy / "dataset_info.json").write_text(json.dumps(facts | {"dataset_name": "name"}))
print([(row.prompt, row.answer) for row in open_source(TaskSource(path="org/name"))])
"""


def test_a_hub_data_set_in_the_cache_is_read_without_a_connection(
    tmp_path: Path, cache: Path
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", HUB, questions(tmp_path / "a.jsonl", 2)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache.parent)},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "[('q0', '0'), ('q1', '1')]"


def test_pages_of_the_rows_are_released_after_many_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speed_async.environments.dataset.rows.RELEASE_READS", 4)
    row = {"problem": "q" * 100_000, "answer": 1}
    path = lines(
        tmp_path / "a.jsonl", [row | {"problem": f"{i} {row['problem']}"} for i in range(64)]
    )
    task = load(TaskSource(path=path), num_held_out=1)
    [mapped] = open_source(TaskSource(path=path)).pages.maps

    def resident_bytes() -> int:
        """Of the mapped Arrow file, in all of its mappings of this process."""
        found, total = False, 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if line.split()[0].count("-") == 1 and ":" not in line.split()[0]:
                found = ".arrow" in line
            elif found and line.startswith("Rss:"):
                total += 1024 * int(line.split()[1])
        return total

    before = [prompt.text for prompt in task.train_prompts]
    assert resident_bytes() < len(mapped) / 2  # all of it without a release
    assert [prompt.text for prompt in task.train_prompts] == before
