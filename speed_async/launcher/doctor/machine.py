"""What this machine offers: cores, memory, shared memory, open files and disk."""

import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from speed_async.launcher.preflight.findings import Findings
from speed_async.launcher.preflight.host_memory import host_memory
from speed_async.launcher.preflight.machine import nearest_existing, size

GIB, MIB = 1 << 30, 1 << 20
SHARED_MEMORY = Path("/dev/shm")
MIN_OPEN_FILES = 1024
SMALL_SHARED_MEMORY_BYTES = 64 * MIB
"""What Docker gives a container by default."""
SMALL_DISK_BYTES = GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineFacts:
    """A figure is None where it cannot be read."""

    num_cores: int
    """Cores that this process may use."""
    memory_bytes: int | None
    available_memory_bytes: int | None
    memory_limit_bytes: int | None
    """Limit of the container or job, if it is below the memory of the machine."""
    shared_memory_bytes: int | None
    """Size of /dev/shm."""
    free_shared_memory_bytes: int | None
    max_open_files: int
    """The soft limit of this process."""
    max_settable_open_files: int
    """The hard limit, which `ulimit -n` can set."""
    free_disk_bytes: dict[str, int]
    """By folder: the current one, and the cache of the Hugging Face hub."""


def read_machine() -> MachineFacts:
    memory = host_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shared = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    return MachineFacts(
        num_cores=_num_cores(),
        memory_bytes=memory.total_bytes if memory else None,
        available_memory_bytes=memory.available_bytes if memory else None,
        memory_limit_bytes=memory.limit_bytes if memory else None,
        shared_memory_bytes=shared.total if shared else None,
        free_shared_memory_bytes=shared.free if shared else None,
        max_open_files=_files(soft),
        max_settable_open_files=_files(hard),
        free_disk_bytes={
            str(folder): shutil.disk_usage(nearest_existing(folder)).free
            for folder in (Path.cwd(), hub_cache())
        },
    )


def check_machine(facts: MachineFacts, findings: Findings) -> None:
    """Show the facts, and warn about limits that runs often reach."""
    findings.show("machine", list(_lines(facts)))
    if facts.max_open_files < MIN_OPEN_FILES:
        settable = min(facts.max_settable_open_files, 65_536)
        remedy = f"run `ulimit -n {settable}` before"
        if settable < MIN_OPEN_FILES:
            remedy = "ask the administrator to raise the hard limit (limits.conf), or start the "
            remedy += f"container with --ulimit nofile={65_536}"
        findings.warnings.append(
            f"this process may open {facts.max_open_files:,} files, fewer than "
            f"{MIN_OPEN_FILES:,}: {remedy}"
        )
    shared = facts.shared_memory_bytes
    if shared is not None and shared <= SMALL_SHARED_MEMORY_BYTES:
        findings.warnings.append(
            f"{SHARED_MEMORY} has {size(shared)}, which NCCL, vLLM and weights.backend = 'ipc' can "
            "exceed: start the container with --shm-size 8g (Kubernetes: an emptyDir volume of "
            f"medium Memory at {SHARED_MEMORY})"
        )
    for folder, free in facts.free_disk_bytes.items():
        if free < SMALL_DISK_BYTES:
            findings.warnings.append(
                f"{size(free)} of disk are free at {folder}: remove files there, or use another "
                "disk (run.folder for runs, HF_HOME for models and data sets)"
            )


def hub_cache() -> Path:
    """Folder of the models of the Hugging Face hub, without importing huggingface_hub."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _lines(facts: MachineFacts) -> list[str]:
    lines = [f"cores: {facts.num_cores}"]
    if facts.memory_bytes is not None and facts.available_memory_bytes is not None:
        limit = facts.memory_limit_bytes
        lines.append(
            f"memory: {size(facts.available_memory_bytes)} available of {size(facts.memory_bytes)}"
            + (f", limited to {size(limit)} by the container or job" if limit is not None else "")
        )
    if facts.shared_memory_bytes is not None and facts.free_shared_memory_bytes is not None:
        free = size(facts.free_shared_memory_bytes)
        lines.append(f"{SHARED_MEMORY}: {free} free of {size(facts.shared_memory_bytes)}")
    lines.append(f"open files: at most {facts.max_open_files:,}")
    lines += [
        f"disk: {size(free)} free at {folder}" for folder, free in facts.free_disk_bytes.items()
    ]
    return lines


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _files(limit: int) -> int:
    return 1 << 30 if limit == resource.RLIM_INFINITY else limit
