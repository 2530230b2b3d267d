"""The GPUs of an actor that joins: those with the most free memory that no other joiner has.

A joiner claims its GPUs by a lock on a file for as long as its supervisor runs, because the memory
of an actor that is still starting looks free. Does not import torch.
"""

import fcntl
import os
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits")
QUERY_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuChoice:
    gpus: tuple[str, ...]
    """Entries of CUDA_VISIBLE_DEVICES."""
    shared: bool
    """Other joiners have claimed them: there are too few."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gpu:
    uuid: str
    free_mib: int


def claim_gpus(num: int, visible: Sequence[str], folder: Path, claims: ExitStack) -> GpuChoice:
    """Claim `num` of the `visible` GPUs (entries of CUDA_VISIBLE_DEVICES) until `claims` is closed.

    `folder`: private folder of this user, the same for all joiners of the machine. With too few
    GPUs that no other joiner has, the ones with the most free memory are shared. Entries that
    nvidia-smi does not list (as without it) come last, in their order. Raises OSError.
    """
    known = _query()
    # Indices are those of nvidia-smi (PCI order); an entry may also be the beginning of a UUID.
    found = {
        entry: next((g for i, g in known if entry == i or g.uuid.startswith(entry)), None)
        for entry in visible
    }
    free_mib = {entry: -1 if gpu is None else gpu.free_mib for entry, gpu in found.items()}
    ranked = sorted(found, key=free_mib.__getitem__, reverse=True)
    with ExitStack() as taken:
        free: list[str] = []
        for entry in ranked:
            gpu = found[entry]
            if len(free) < num and _lock(folder, entry if gpu is None else gpu.uuid, taken):
                free.append(entry)
        if len(free) == num:
            claims.push(taken.pop_all())
            return GpuChoice(gpus=tuple(free), shared=False)
    return GpuChoice(gpus=tuple(ranked[:num]), shared=True)


def _query() -> list[tuple[str, _Gpu]]:
    """Index and GPU of each line of nvidia-smi; none if it is missing or fails."""
    try:
        done = subprocess.run(
            QUERY, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(", ") for line in done.stdout.splitlines())
    return [
        (row[0], _Gpu(uuid=row[1], free_mib=int(row[2]) if row[2].isdigit() else 0))
        for row in rows
        if len(row) == 3
    ]


def _lock(folder: Path, gpu: str, claims: ExitStack) -> bool:
    """Whether the lock was free; it is then held until `claims` is closed."""
    descriptor = os.open(folder / f"{gpu.replace('/', '-')}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    claims.callback(os.close, descriptor)
    return True
