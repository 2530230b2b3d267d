"""A small file that is there whole or not at all, and stays so over a power cut."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write `path` in place of what it held; when this returns, the disk has it. Raises OSError:
    what it held before is then still there."""
    pending = path.with_name(f".{path.name}.partial")
    with pending.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    pending.replace(path)
    flush(path.parent)  # a name that only memory has is none after a power cut


def flush(path: Path) -> None:
    """Have the kernel write a file, or the entries of a folder, to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
