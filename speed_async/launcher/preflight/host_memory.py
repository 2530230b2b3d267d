"""Memory of this machine, within the limit of the container or job that this process runs in."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
V1_UNLIMITED_BYTES = 1 << 60
"""Version 1 of cgroups shows a larger number if there is no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    total_bytes: int
    available_bytes: int
    limit_bytes: int | None
    """Limit of the process's cgroups, if one is lower than the memory of the machine."""


def host_memory(root: Path = ROOT) -> HostMemory | None:
    """None where /proc/meminfo cannot be read."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        sizes = {line.partition(":")[0]: 1024 * int(line.split()[1]) for line in lines}
        total, available = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    limits = [(limit, used) for limit, used in _cgroup_limits(root) if limit < total]
    return HostMemory(
        total_bytes=total,
        available_bytes=min([available, *(max(0, limit - used) for limit, used in limits)]),
        limit_bytes=min((limit for limit, _ in limits), default=None),
    )


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """Limit and used bytes of each cgroup of this process that has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        names = ("memory.max", "memory.current", "inactive_file")
        if controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        # In a container, the folder of its own cgroup is often mounted as the root.
        folder = base / own.lstrip("/")
        for each in (folder, *folder.parents):
            if each.is_relative_to(base) and (found := _limit(each, *names)) is not None:
                limits.append(found)
    return limits


def _limit(
    folder: Path, limit_name: str, used_name: str, cached_name: str
) -> tuple[int, int] | None:
    """Limit and used bytes, without the part of the page cache that the kernel frees first."""
    try:
        limit = int((folder / limit_name).read_text())  # `max` is no number
        used = int((folder / used_name).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.split()[0] == cached_name)
    except (OSError, ValueError, IndexError):
        return None
    return (limit, used - cached) if limit < V1_UNLIMITED_BYTES else None
