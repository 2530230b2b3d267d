"""The journal file: what was appended is read again, and a damaged tail is cut, never guessed."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_async.buffer.durability.journal import (
    Journal,
    cut,
    read_segment,
    segments,
)
from speed_async.errors import JournalError


def written(folder: Path, count: int = 5) -> Journal:
    journal = Journal.begin(folder, 1, 0)
    for index in range(count):
        frames = [b"frame" * index, b"x" * 1000]
        journal.append("message", float(index), peer=f"actor-{index}.0", frames=frames)
    journal.write()
    return journal


def test_records_come_back_as_they_were_appended(tmp_path: Path) -> None:
    written(tmp_path).close()
    records = [record for _, record in read_segment(tmp_path, 1)]
    assert [record.sequence for record in records] == [1, 2, 3, 4, 5]
    assert [record.peer for record in records] == [f"actor-{i}.0" for i in range(5)]
    assert bytes(records[3].frames[0]) == b"frame" * 3


def test_a_place_leads_to_its_record_also_before_it_is_written(tmp_path: Path) -> None:
    journal = written(tmp_path, 0)
    journal.append("tick", 1.0)
    place = journal.append("message", 2.0, peer="a", frames=[b"abc"])
    assert bytes(journal.read(place).frames[0]) == b"abc"
    journal.close()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_cut_or_flipped_bit_leaves_a_prefix(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    written(folder).close()
    path = folder / "00000001.journal"
    ends = [record.end for _, record in read_segment(folder, 1)]
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(whole[:at])
    else:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(damaged)
    survivors = list(read_segment(folder, 1))
    assert len(survivors) == sum(end <= at for end in ends)
    end = ends[len(survivors) - 1] if survivors else 0
    cut(folder, 1, end)
    assert path.stat().st_size == end


def test_a_full_disk_loses_nothing_and_leaves_no_half_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = written(tmp_path)
    size = journal.num_bytes
    journal.append("message", 9.0, peer="late", frames=[b"y" * 5000])
    real = os.pwrite

    def takes_a_part(file: int, part: memoryview, at: int) -> int:
        real(file, part[:4096], at)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", takes_a_part)
    with pytest.raises(OSError, match="No space"):
        journal.write()
    assert (tmp_path / "00000001.journal").stat().st_size == size
    monkeypatch.undo()
    journal.write()
    journal.close()
    assert [record.peer for _, record in read_segment(tmp_path, 1)][-1] == "late"


def test_segments_that_nobody_needs_are_removed(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        Journal.begin(tmp_path, number, 0).close()
    journal = Journal.begin(tmp_path, 4, 0)
    journal.drop({2})
    assert segments(tmp_path) == [2, 4]
    journal.close()


def test_a_place_that_is_damaged_or_gone_is_an_error_that_says_where(tmp_path: Path) -> None:
    journal = written(tmp_path)
    place = journal.append("message", 1.0, frames=[b"abc"])
    journal.write()
    os.truncate(tmp_path / "00000001.journal", place[1] + 3)
    with pytest.raises(JournalError, match="segment 1 is damaged at byte"):
        journal.read(place)
    with pytest.raises(JournalError, match="segment 7 cannot be read"):
        journal.read((7, 0))
    journal.close()
