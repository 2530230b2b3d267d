"""Replaces a folder as a whole: what is half-written is never taken for a prepared data set."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speed_async.config.whole_file import flush
from speed_async.errors import DataError


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place when the block ends without an error.

    Raises DataError while another process prepares `out`. Whatever a killed process left in the
    staging folder is removed. Raises OSError.
    """
    staging = out.with_name(f".{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(staging)
    try:
        _empty(staging)
        yield staging
        for file in staging.iterdir():
            flush(file)
        flush(staging)
        _replace(out, staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _lock(staging: Path) -> int:
    """Create and lock the staging folder; return the descriptor that holds the lock."""
    while True:
        staging.mkdir(exist_ok=True)
        try:
            descriptor = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process has just renamed it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DataError(
                f"another process is writing '{staging}': wait for its end, or choose another --out"
            ) from None
        try:
            if os.path.samestat(os.fstat(descriptor), staging.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _replace(out: Path, staging: Path) -> None:
    """Rename `staging` to `out`. A kill between the renames leaves no `out`, never half of one."""
    previous = out.with_name(f".{out.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if out.exists():
        out.rename(previous)
    staging.rename(out)
    flush(out.parent)
    shutil.rmtree(previous, ignore_errors=True)
