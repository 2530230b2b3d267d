"""Restart of a killed service process at its previous ports."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from speed_async.errors import RoleError
from speed_async.launcher.attempt import Ports
from speed_async.launcher.roles import service_process
from speed_async.launcher.roles.service_process import ServiceProcess
from speed_async.launcher.run_folder import RunFolder
from tests.fakes.buffer_fixtures import make_config

KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
SERVES = """
import json, sys
port = int(sys.argv[sys.argv.index("--port") + 1]) or 4001
feed_port = int(sys.argv[sys.argv.index("--feed-port") + 1]) or 4002
print(json.dumps({"port": port, "feed_port": feed_port}), flush=True)
"""
SERVES_UNTIL_KILLED = SERVES + KILLED
SERVES_UNTIL_END = SERVES + "input()"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Arguments of all started processes."""
    monkeypatch.setattr(service_process, "RESTART_PAUSE_S", 0.0)
    return []


def make(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[list[str]],
    *scripts: str,
    **buffer: str,
) -> ServiceProcess:
    """A service whose successive processes run `scripts`."""
    remaining: Iterator[str] = iter(scripts)

    async def start_role(role: str, arguments: list[str], **_: object):
        started.append(arguments)
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", next(remaining), *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )

    monkeypatch.setattr(service_process, "start_role", start_role)
    (folder / "config.json").write_text("{}")
    (folder / "logs").mkdir()
    config = make_config(str(folder), buffer=buffer)
    return ServiceProcess(config, RunFolder(path=folder), attempt=0)


def test_process_killed_before_it_has_ports_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[list[str]]
) -> None:
    service = make(tmp_path, monkeypatch, started, KILLED, KILLED, SERVES_UNTIL_END)

    async def run() -> None:
        await service.start(Ports(service=0, feed=17))
        await service.end(0.1)

    asyncio.run(run())
    assert service.ports == Ports(service=4001, feed=17)
    assert len(started) == 3


def test_process_killed_at_every_start_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[list[str]]
) -> None:
    service = make(tmp_path, monkeypatch, started, *[KILLED] * 9)
    with pytest.raises(RoleError, match=r"buffer service: died; see .*service\.log"):
        asyncio.run(service.start(Ports()))
    assert len(started) == 6


def test_process_without_a_journal_is_not_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[list[str]]
) -> None:
    service = make(tmp_path, monkeypatch, started, KILLED, durability="none")
    with pytest.raises(RoleError, match="died"):
        asyncio.run(service.start(Ports()))
    assert len(started) == 1


def test_process_that_exits_without_output_is_an_immediate_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[list[str]]
) -> None:
    service = make(tmp_path, monkeypatch, started, "", SERVES)
    with pytest.raises(RoleError, match="died"):
        asyncio.run(service.start(Ports()))


def test_killed_process_restarts_at_its_ports_even_if_killed_again_during_the_restart(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[list[str]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    service = make(tmp_path, monkeypatch, started, SERVES_UNTIL_KILLED, KILLED, SERVES)

    async def run() -> None:
        await service.start(Ports())
        await asyncio.wait_for(service.watch(), 60)

    asyncio.run(run())
    assert service.ports == Ports(service=4001, feed=4002)
    assert [arguments[-3:] for arguments in started[1:]] == [["4001", "--feed-port", "4002"]] * 2
    assert "was killed (SIGKILL); it recovers from its journal" in capfd.readouterr().err
