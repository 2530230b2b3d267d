"""Memory of the machine and of the cgroups of this process, from files that a test writes."""

from pathlib import Path

import pytest

from speed_async.launcher.preflight.host_memory import HostMemory, host_memory

KIB, MIB = 1 << 10, 1 << 20


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


MEMINFO = {"proc/meminfo": f"MemTotal: {8 * MIB} kB\nMemFree: 1 kB\nMemAvailable: {6 * MIB} kB"}
V1 = "sys/fs/cgroup/memory/job/"
V2 = "sys/fs/cgroup/job/"


@pytest.mark.parametrize(
    ("files", "available_gib", "limit_gib"),
    [
        ({}, 6, None),
        # The limit of a parent, 4 GiB, of which 3 are used and 2 of these are page cache.
        (
            {
                "proc/self/cgroup": "0::/job/part",
                "sys/fs/cgroup/job/part/memory.max": "max",
                f"{V2}memory.max": 4096 * MIB,
                f"{V2}memory.current": 3072 * MIB,
                f"{V2}memory.stat": f"anon 1\ninactive_file {2048 * MIB}",
            },
            3,
            4,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n0::/",
                f"{V1}memory.limit_in_bytes": 2048 * MIB,
                f"{V1}memory.usage_in_bytes": 1024 * MIB,
                f"{V1}memory.stat": "total_inactive_file 0",
            },
            1,
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/job",
                f"{V1}memory.limit_in_bytes": 0x7FFFFFFFFFFFF000,
                f"{V1}memory.usage_in_bytes": 1,
                f"{V1}memory.stat": "",
            },
            6,
            None,
        ),
    ],
    ids=["no cgroup", "version 2", "version 1", "version 1 without a limit"],
)
def test_lowest_limit_of_the_machine_and_its_cgroups(
    tmp_path: Path, files: dict[str, object], available_gib: int, limit_gib: int | None
) -> None:
    write(tmp_path, {**MEMINFO, **files})
    assert host_memory(tmp_path) == HostMemory(
        total_bytes=8 * MIB * KIB,
        available_bytes=available_gib * MIB * KIB,
        limit_bytes=None if limit_gib is None else limit_gib * MIB * KIB,
    )


def test_machine_without_meminfo_is_unknown(tmp_path: Path) -> None:
    assert host_memory(tmp_path) is None
