"""Warnings about the limits of a machine."""

from dataclasses import replace
from pathlib import Path

import pytest

from speed_async.launcher.doctor.machine import (
    GIB,
    MIB,
    MachineFacts,
    check_machine,
    hub_cache,
    read_machine,
)
from speed_async.launcher.preflight.findings import Findings

FACTS = MachineFacts(
    num_cores=8,
    memory_bytes=64 * GIB,
    available_memory_bytes=10 * GIB,
    memory_limit_bytes=16 * GIB,
    shared_memory_bytes=8 * GIB,
    free_shared_memory_bytes=8 * GIB,
    max_open_files=1024,
    max_settable_open_files=1 << 20,
    free_disk_bytes={"/data": 20 * GIB},
)


def test_facts_are_shown_with_their_limits() -> None:
    findings = Findings()
    check_machine(FACTS, findings)
    [(heading, lines)] = findings.sections
    assert (heading, findings.warnings, findings.errors) == ("machine", [], [])
    assert lines == [
        "cores: 8",
        "memory: 10.0 GiB available of 64.0 GiB, limited to 16.0 GiB by the container or job",
        "/dev/shm: 8.0 GiB free of 8.0 GiB",
        "open files: at most 1,024",
        "disk: 20.0 GiB free at /data",
    ]


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"max_open_files": 256}, "may open 256 files, fewer than 1,024: run `ulimit -n 65536`"),
        (
            {"max_open_files": 256, "max_settable_open_files": 512},
            "raise the hard limit (limits.conf), or start the container with --ulimit nofile=",
        ),
        ({"shared_memory_bytes": 64 * MIB}, "start the container with --shm-size 8g"),
        ({"free_disk_bytes": {"/full": 5 * MIB}}, "5.0 MiB of disk are free at /full"),
    ],
)
def test_low_limit_is_a_warning_with_a_remedy(change: dict[str, object], warning: str) -> None:
    findings = Findings()
    check_machine(replace(FACTS, **change), findings)
    [found] = findings.warnings
    assert warning in found


def test_this_machine_can_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    facts = read_machine()
    assert facts.num_cores > 0
    assert facts.max_open_files > 0
    assert facts.free_disk_bytes.keys() == {str(Path.cwd()), str(tmp_path / "not" / "yet")}


def test_cache_of_the_hub_is_that_of_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", "/data/hf")
    assert hub_cache() == Path("/data/hf/hub")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert hub_cache() == Path("/cache/huggingface/hub")
