"""The journal's direct file: it contains the appended bytes, whatever their sizes."""

import os
from pathlib import Path

import pytest

from speed_async.buffer.durability import direct_file
from speed_async.buffer.durability.direct_file import (
    BLOCK_BYTES,
    BUFFER_BYTES,
    DirectFile,
    is_padding,
)

SIZES = (
    1,
    0,
    100,
    BLOCK_BYTES - 101,
    BLOCK_BYTES,
    3 * BLOCK_BYTES + 7,
    BUFFER_BYTES + 5,
    12,
    4000,
    90_000,
    3,
    9000,
)


def pieces() -> list[bytes]:
    return [bytes([index + 1]) * size for index, size in enumerate(SIZES)]


@pytest.mark.parametrize("has_direct", [True, False])
def test_the_file_contains_the_appended_bytes(
    tmp_path: Path, has_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_direct:
        monkeypatch.setattr(direct_file.os, "O_DIRECT", 0)
    path = tmp_path / "file"
    file = DirectFile(path)
    appended = b""
    for piece in pieces():
        file.append([piece[:7], memoryview(piece)[7:]])
        appended += piece
        assert file.end == len(appended)
        on_disk = path.read_bytes()  # as after a kill: padded to whole blocks
        assert on_disk[: len(appended)] == appended
        assert is_padding(on_disk[len(appended) :])
    file.sync()
    file.close()
    assert path.read_bytes() == appended


def test_a_failed_append_leaves_the_file_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    file = DirectFile(path)
    file.append([b"a" * 5000])
    monkeypatch.setattr(os, "pwrite", lambda *_: 512)  # a partial write
    for size in (9000, 200_000):
        with pytest.raises(OSError, match="No space"):
            file.append([b"b" * size])
    assert path.read_bytes() == b"a" * 5000
    monkeypatch.undo()
    file.append([b"c" * 9000])
    file.close()
    assert path.read_bytes() == b"a" * 5000 + b"c" * 9000


def test_padding_is_less_than_a_block_of_zeros() -> None:
    assert is_padding(b"") and is_padding(bytes(BLOCK_BYTES - 1))
    assert not is_padding(bytes(BLOCK_BYTES))
    assert not is_padding(bytes(10) + b"x")
