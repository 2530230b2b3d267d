"""The journal file: appended records are read back, and a damaged tail is cut off."""

import os
from collections.abc import Sequence
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
from speed_async.transport.codec import Frame


def written(folder: Path, count: int = 5) -> Journal:
    journal = Journal.begin(folder, 1, 0)
    for index in range(count):
        frames = [b"frame" * index, b"x" * 1000]
        journal.append("message", float(index), peer=f"actor-{index}.0", frames=frames)
    journal.write()
    return journal


def test_records_are_read_back_as_appended(tmp_path: Path) -> None:
    written(tmp_path).close()
    records = [record for _, record in read_segment(tmp_path, 1)]
    assert [record.sequence for record in records] == [1, 2, 3, 4, 5]
    assert [record.peer for record in records] == [f"actor-{i}.0" for i in range(5)]
    assert bytes(records[3].frames[0]) == b"frame" * 3


def test_written_records_of_any_size_are_in_the_file(tmp_path: Path) -> None:
    journal = Journal.begin(tmp_path, 1, 0)
    appended: list[bytes] = []
    for index, size in enumerate((1, 0, 100, 3995, 4096, 12295, 4 << 20, 12, 90_000, 3)):
        piece = bytes([index + 1]) * size
        journal.append("message", 0.0, frames=[piece[:7], memoryview(piece)[7:]])
        journal.write()
        appended.append(piece)
        records = [record for _, record in read_segment(tmp_path, 1)]  # as after a kill
        assert [b"".join(record.frames) for record in records] == appended
        assert (tmp_path / "00000001.journal").stat().st_size == records[-1].end
    journal.sync()
    journal.close()
    records = [record for _, record in read_segment(tmp_path, 1)]
    assert [b"".join(record.frames) for record in records] == appended


def test_a_record_can_be_read_before_it_is_written(tmp_path: Path) -> None:
    journal = written(tmp_path, 0)
    journal.append("tick", 1.0)
    position = journal.append("message", 2.0, peer="a", frames=[b"abc"])
    assert bytes(journal.read(position).frames[0]) == b"abc"
    journal.close()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_cut_or_flipped_bit_leaves_a_valid_prefix(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    written(folder).close()
    path = folder / "00000001.journal"
    ends = [record.end for _, record in read_segment(folder, 1)]
    intact = path.read_bytes()
    offset = data.draw(st.integers(0, len(intact) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(intact[:offset])
    else:
        damaged = bytearray(intact)
        damaged[offset] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(damaged)
    survivors = list(read_segment(folder, 1))
    assert len(survivors) == sum(end <= offset for end in ends)
    end = ends[len(survivors) - 1] if survivors else 0
    cut(folder, 1, end)
    assert path.stat().st_size == end


@pytest.mark.parametrize("num_bytes", [5000, 9000, 200_000])
def test_a_full_disk_loses_nothing_and_leaves_no_partial_record(
    tmp_path: Path, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = written(tmp_path)
    size = journal.num_bytes
    journal.append("message", 9.0, peer="late", frames=[b"y" * num_bytes])
    real = os.pwritev

    def partial_write(file: int, parts: Sequence[Frame], offset: int) -> int:
        if offset > size + 512:
            raise OSError(28, "No space left on device")
        return real(file, [b"".join(parts)[:512]], offset)

    monkeypatch.setattr(os, "pwritev", partial_write)
    with pytest.raises(OSError, match="No space"):
        journal.write()
    assert (tmp_path / "00000001.journal").stat().st_size == size
    monkeypatch.undo()
    journal.write()
    journal.close()
    assert [record.peer for _, record in read_segment(tmp_path, 1)][-1] == "late"


def test_unneeded_segments_are_removed(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        Journal.begin(tmp_path, number, 0).close()
    journal = Journal.begin(tmp_path, 4, 0)
    journal.drop({2})
    assert segments(tmp_path) == [2, 4]
    journal.close()


def test_a_damaged_or_missing_record_raises_an_error_with_its_position(tmp_path: Path) -> None:
    journal = written(tmp_path)
    position = journal.append("message", 1.0, frames=[b"abc"])
    journal.write()
    os.truncate(tmp_path / "00000001.journal", position[1] + 3)
    with pytest.raises(JournalError, match="segment 1 is damaged at byte"):
        journal.read(position)
    with pytest.raises(JournalError, match="segment 7 cannot be read"):
        journal.read((7, 0))
    journal.close()
