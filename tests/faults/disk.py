"""A small disk for the run folder that can be filled and freed.

As root, this is a separate bounded tmpfs. Otherwise it is a limit on the file size (RLIMIT_FSIZE)
of the writing processes, which fails the same writes with another error number.
"""

import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BALLAST = "ballast"
BALLAST_CHUNK = bytes(1024 * 1024)


class SmallDisk:
    """A mounted tmpfs. A run writes to `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, writers: Iterable[int]) -> None:
        """Fill all free space. `writers`: processes that write there (unused here)."""
        with suppress(OSError), (self.folder / BALLAST).open("ab", buffering=0) as file:
            for size in (len(BALLAST_CHUNK), 4096, 1):
                with suppress(OSError):
                    while file.write(BALLAST_CHUNK[:size]) == size:
                        pass

    def free(self, writers: Iterable[int]) -> None:
        (self.folder / BALLAST).unlink(missing_ok=True)


class LimitedFiles:
    """Without a separate disk: the given processes temporarily cannot extend any file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, writers: Iterable[int]) -> None:
        self._limit(writers, 0)

    def free(self, writers: Iterable[int]) -> None:
        self._limit(writers, resource.RLIM_INFINITY)

    def _limit(self, writers: Iterable[int], num_bytes: int) -> None:
        for process_id in writers:
            with suppress(ProcessLookupError):
                _, hard = resource.prlimit(process_id, resource.RLIMIT_FSIZE)
                resource.prlimit(process_id, resource.RLIMIT_FSIZE, (num_bytes, hard))


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[SmallDisk | LimitedFiles]:
    """Mount a disk of `num_bytes` at `folder` if this user may; unmounted on exit."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    try:
        tried = subprocess.run(mount, capture_output=True) if sys.platform == "linux" else None
        mounted = tried is not None and tried.returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        yield LimitedFiles(folder)
        return
    try:
        yield SmallDisk(folder)
    finally:
        # Lazily: a terminating process may hold a file. Its memory is freed with the file.
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)
