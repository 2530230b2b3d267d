"""Atomic and durable writes of small files."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of `path` atomically and durably.

    Raises OSError; the previous content is kept then.
    """
    pending = path.with_name(f".{path.name}.partial")
    with pending.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    pending.replace(path)
    flush(path.parent)  # make the rename durable


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk (fsync). Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
