"""The file of samples: durable, resumable, bound to its settings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from speed_async.errors import DataError, SpeedAsyncError
from speed_async.evaluation.records import SampleFile, SampleRecord, read_records

SETTINGS = {"model": "abc", "temperature": 1.0, "seed": 0}
RECORD = SampleRecord(
    prompt_id=3,
    sample=1,
    level="carries=2",
    num_tokens=5,
    finish_reason="stop",
    outcome="scored",
    reward=1.0,
    passed=True,
    extracted="42",
    answer="42",
    text="it is\n42 \u221a \u2028",
)


def test_records_are_read_back_by_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "out" / "aime24.jsonl"
    unscored = replace(RECORD, sample=2, outcome="timeout", reward=None, passed=False, error="10 s")
    with SampleFile(path, SETTINGS) as file:
        assert file.records == []
        file.append(RECORD)
        file.append(unscored)
    assert len(path.read_text().strip().split("\n")) == 2
    with SampleFile(path, SETTINGS) as file:
        assert file.records == [RECORD, unscored] == read_records(path)


def test_a_torn_last_line_is_dropped_and_its_sample_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with SampleFile(path, SETTINGS) as file:
        file.append(RECORD)
    torn = replace(RECORD, sample=2).line()
    for cut in (1, len(torn) // 2, len(torn) - 1):
        path.write_text(RECORD.line() + torn[:cut])
        assert read_records(path) == [RECORD]
        with SampleFile(path, SETTINGS) as file:
            assert file.records == [RECORD]
            file.append(replace(RECORD, sample=2))
        assert path.read_text() == RECORD.line() + torn


def test_a_damaged_line_names_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with SampleFile(path, SETTINGS) as file:
        file.append(RECORD)
    path.write_text(RECORD.line() + "{broken\n" + RECORD.line())
    with pytest.raises(DataError, match=r"line 2: not a sample .* remove the line"):
        SampleFile(path, SETTINGS).__enter__()


def test_a_started_file_is_bound_to_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with SampleFile(path, SETTINGS) as file:
        file.append(RECORD)
    with pytest.raises(SpeedAsyncError, match=r"temperature was 1.0 and is 0.0\): use the same"):
        SampleFile(path, SETTINGS | {"temperature": 0.0}).__enter__()
    (tmp_path / "a.settings.json").unlink()
    with pytest.raises(SpeedAsyncError, match=r"'a.settings.json' is missing"):
        SampleFile(path, SETTINGS).__enter__()


def test_two_evaluations_cannot_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with (
        SampleFile(path, SETTINGS),
        pytest.raises(SpeedAsyncError, match="being written by another"),
    ):
        SampleFile(path, SETTINGS).__enter__()


def test_every_line_is_synced_within_the_interval(tmp_path: Path, monkeypatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(descriptor))
    now_s = [0.0]
    with SampleFile(tmp_path / "a.jsonl", SETTINGS, clock=lambda: now_s[0]) as file:
        synced.clear()
        file.append(RECORD)
        assert synced == []
        now_s[0] = 1.5
        file.append(replace(RECORD, sample=2))
        assert len(synced) == 1
    assert json.loads((tmp_path / "a.settings.json").read_text()) == SETTINGS
