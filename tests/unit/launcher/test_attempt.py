"""Attempts of a run: overrides on resume, folder lock, numbers, ports, and supervision."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from speed_async.config.load import build_config, read_resolved
from speed_async.config.resumed import load_resumed
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, RunFinished, SpeedAsyncError
from speed_async.launcher.attempt import Ports, begin_attempt, check_resumable, save_ports
from speed_async.launcher.ports import becomes_free, listens
from speed_async.launcher.roles.join import RunEnd
from speed_async.launcher.roles.supervisor import ActorPlan, supervise
from speed_async.launcher.run_folder import RunFolder
from speed_async.transport.messages import ActorExited


@pytest.fixture
def config(tmp_path: Path) -> Config:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return build_config(
        {
            "algorithm": "speed-rloo",
            "run": {"folder": str(tmp_path / "run"), "updates": 9},
            "model": {"path": str(model)},
            "task": {"name": "arithmetic", "options": {"a": 1}},
            "cluster": {"actors": 2},
        }
    )


@pytest.fixture
def begin(config: Config) -> Callable[..., object]:
    """Begins an attempt and releases the lock, like the exit of its process."""

    def begin(of: Config = config, *, restarted_in: Path | None = None, resume: bool = False):
        attempt = begin_attempt(of, restarted_in=restarted_in, resume=resume)
        os.close(attempt.lock)
        return attempt

    return begin


# --- overrides on resume -----------------------------------------------------------------------


def test_resumed_run_applies_overrides_to_its_own_configuration(config: Config, begin) -> None:
    begin()
    folder = Path(config.run.folder)
    overrides = ["--run.updates", "20", "--learner.lr", "1e-4", "--buffer.durability", "every"]
    resumed = load_resumed(folder, overrides)
    assert (resumed.run.updates, resumed.learner.lr) == (20, 1e-4)
    assert resumed.buffer.durability == "every"
    assert resumed.model == config.model
    assert load_resumed(folder) == config


def test_moved_run_folder_is_resumed_at_its_new_path(config: Config, begin, tmp_path: Path) -> None:
    begin()
    Path(config.run.folder).rename(tmp_path / "moved")
    assert load_resumed(tmp_path / "moved").run.folder == str(tmp_path / "moved")


@pytest.mark.parametrize(
    ("override", "field", "message"),
    [
        (["--gate.n_init", "5"], "gate.n_init", "began with 4"),
        (["--task.options.a", "2"], "task.options.a", "began with 1"),
        (["--task.name", "reasoning_gym:x"], "task.name", "began with 'arithmetic'"),
        (["--curriculum.kind", "posterior"], "curriculum.kind", "began with 'uniform'"),
        (["--algorithm", "dapo"], "algorithm", "began with 'speed-rloo'"),
        (["--buffer.max_staleness", "1"], "buffer.max_staleness", "began with 2"),
        (["--learner.groups_per_update", "8"], "learner.groups_per_update", "began with 16"),
        (["--actors.temperature", "0.5"], "actors.temperature", "began with 1.0"),
        (["--run.seed", "1"], "run.seed", "start a new run"),
        (["--run.folder", "elsewhere"], "run.folder", "start a new run"),
        (["--model.chat_template", "true"], "model.chat_template", "began with False"),
        (["--buffer.durability", "none"], "buffer.durability", "without a journal"),
    ],
)
def test_fields_that_the_journal_depends_on_cannot_be_changed(
    config: Config, begin, override: list[str], field: str, message: str
) -> None:
    begin()
    with pytest.raises(ConfigError) as caught:
        load_resumed(Path(config.run.folder), override)
    assert caught.value.field == field
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpeedAsyncError, match=r"not a run folder.*give a run folder"):
        load_resumed(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SpeedAsyncError, match="cannot be read"):
        load_resumed(tmp_path)


# --- attempts ----------------------------------------------------------------------------------


def test_each_attempt_uses_the_same_folder_and_the_next_number(config: Config, begin) -> None:
    first = begin()
    assert (first.number, first.checkpoint, first.resume_banner()) == (0, None, [])
    longer = config.model_copy(update={"run": config.run.model_copy(update={"updates": 11})})
    second = begin(longer, resume=True)
    assert (second.number, second.folder) == (1, first.folder)
    assert second.resume_banner() == [f"resuming {first.folder.path} from its start (attempt 1)\n"]
    assert read_resolved(first.folder.config) == longer  # read by child processes
    restarted = begin(config, restarted_in=first.folder.path)
    assert (restarted.number, restarted.config) == (2, longer)  # not the configuration passed in
    fresh = begin()
    assert (fresh.number, fresh.folder.path.name) == (0, "run-2")


def test_restart_uses_the_number_of_actors_from_torchrun(config: Config, begin) -> None:
    first = begin()
    cluster = config.cluster.model_copy(update={"actors": 5})
    grown = begin(config.model_copy(update={"cluster": cluster}), restarted_in=first.folder.path)
    assert grown.config.cluster.actors == 5


def test_run_without_an_attempt_file_resumes_as_attempt_1(config: Config, begin) -> None:
    (begin().folder.path / "attempt.json").unlink()
    assert begin(resume=True).number == 1


def test_damaged_attempt_file_is_an_error_with_a_remedy(config: Config, begin) -> None:
    (begin().folder.path / "attempt.json").write_text("{")
    with pytest.raises(SpeedAsyncError, match=r"attempt\.json' is damaged.*write"):
        begin(resume=True)


def test_run_in_progress_is_locked_until_its_process_exits(config: Config, begin) -> None:
    folder = begin().folder.path
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from speed_async.launcher.run_folder import RunFolder\n"
        "RunFolder(path=Path(sys.argv[1])).take_lock(0.0)\n"
        "print('locked', flush=True)\nsys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"locked\n"
    for attempt in (lambda: check_resumable(config), lambda: begin(resume=True)):
        with pytest.raises(SpeedAsyncError, match="is in progress: stop it first"):
            attempt()
    holder.kill()
    holder.wait()
    check_resumable(config)
    assert begin(resume=True).number == 1


def test_child_processes_do_not_inherit_the_lock(config: Config) -> None:
    attempt = begin_attempt(config, restarted_in=None, resume=False)
    command = [sys.executable, "-c", "input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, close_fds=False)
    try:
        os.close(attempt.lock)
        # The kernel closes the child's descriptors shortly after the parent continues.
        os.close(attempt.folder.take_lock(5.0))
    finally:
        child.kill()
        child.wait()


def with_run(config: Config, **run: object) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update=run)})


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


COMPLETED = {"completed": True, "policy_version": 9, "accuracy_reached": None}
REACHED = {"completed": True, "policy_version": 4, "accuracy_reached": 0.75}
ALL_UPDATES = "it has completed its 9 updates; to continue training, set a larger --run.updates"
NOTHING_LEARNED = {"outcome": "nothing_learned", "reason": "nothing was learned: of 9 updates"}


@pytest.mark.parametrize(
    ("summary", "target", "message"),
    [
        (COMPLETED, None, ALL_UPDATES),
        (COMPLETED, 0.9, ALL_UPDATES),
        (
            REACHED,
            0.75,
            "accuracy 0.750 was reached at version 4; to continue training, set a higher "
            "--run.stop_at_accuracy",
        ),
        (
            COMPLETED | NOTHING_LEARNED,
            None,
            f"{ALL_UPDATES} (its outcome: nothing was learned: of 9 updates)",
        ),
    ],
)
def test_completed_run_is_finished_and_left_unchanged(
    config: Config, begin, summary: dict[str, object], target: float | None, message: str
) -> None:
    folder = begin().folder
    folder.write_summary(summary)
    before = content(folder.path)
    config = with_run(config, stop_at_accuracy=target)
    for attempt in (
        lambda: check_resumable(config),
        lambda: begin(config, resume=True),
        lambda: begin(config, resume=True),  # the lock was released
    ):
        with pytest.raises(RunFinished) as caught:
            attempt()
        assert str(caught.value) == f"the run in '{folder.path}' is finished: {message}"
    assert content(folder.path) == before


@pytest.mark.parametrize(
    ("summary", "run"),
    [
        (COMPLETED, {"updates": 10}),
        (REACHED, {"stop_at_accuracy": 0.76}),
        (REACHED, {"stop_at_accuracy": None}),
        (COMPLETED | {"completed": False}, {}),  # stopped, or without its last checkpoint
        ({"policy_version": 9}, {}),
        ([], {}),
    ],
)
def test_incomplete_run_can_be_resumed(
    config: Config, begin, summary: dict[str, object], run: dict[str, object]
) -> None:
    begin().folder.write_summary(summary)
    check_resumable(with_run(config, **run))
    assert begin(with_run(config, **run), resume=True).number == 1


def test_run_that_died_before_its_summary_is_not_finished(config: Config, begin) -> None:
    (begin().folder.checkpoints / "version-000009").mkdir(parents=True)
    check_resumable(config)


# --- ports -------------------------------------------------------------------------------------


def listening(port: int = 0) -> socket.socket:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", port))
    server.listen()
    return server


def port_of(server: socket.socket) -> int:
    return server.getsockname()[1]


def test_later_attempt_reuses_the_ports_of_the_previous_one(
    config: Config, begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speed_async.launcher.attempt.PORT_GRACE_S", 0.1)
    with listening() as one, listening() as other:
        ports = Ports(service=port_of(one), feed=port_of(other))
    first = begin()
    assert first.ports == Ports(service=0, feed=0)
    save_ports(first, ports)
    assert begin(resume=True).ports == ports
    with listening(ports.service):
        assert begin(resume=True).ports == Ports(service=0, feed=ports.feed)
    fixed = config.cluster.model_copy(update={"feed_port": 4321})
    configured = begin(config.model_copy(update={"cluster": fixed}), resume=True)
    assert configured.ports == Ports(service=ports.service, feed=0)  # 0: set by the configuration
    elsewhere = config.cluster.model_copy(update={"host": "localhost"})
    assert begin(config.model_copy(update={"cluster": elsewhere}), resume=True).ports == Ports()


def test_port_becomes_free_when_its_process_exits() -> None:
    code = (
        "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\n"
        "print(s.getsockname()[1], flush=True)\ninput()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    port = int(holder.stdout.readline())
    assert not becomes_free("127.0.0.1", port, timeout_s=0.1)
    assert asyncio.run(listens("127.0.0.1", port, timeout_s=5))
    holder.kill()
    assert becomes_free("127.0.0.1", port, timeout_s=10)
    holder.wait()
    assert not asyncio.run(listens("127.0.0.1", port, timeout_s=5))


# --- the supervisor ----------------------------------------------------------------------------

HANGS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
open(sys.argv[1], "w").write(" ".join(sys.argv))
while True:
    time.sleep(1)
"""


async def never() -> RunEnd:
    return await asyncio.Future[RunEnd]()


def supervised(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int
) -> tuple[float, str]:
    """Stop a child that ignores SIGTERM. Returns the seconds it took and its command line."""
    mark = tmp_path / "started"

    async def start_role(role: str, arguments: list[str], **_: object):
        command = (sys.executable, "-c", HANGS, str(mark), role, *arguments)
        return await asyncio.create_subprocess_exec(*command)

    monkeypatch.setattr("speed_async.launcher.roles.supervisor.start_role", start_role)
    (tmp_path / "logs").mkdir()
    plan = ActorPlan(index=3, host="127.0.0.1", port=port, folder=tmp_path, first_incarnation=2000)

    async def refuse_report(exited: ActorExited) -> None:
        raise AssertionError(f"the child did not die by itself: {exited}")

    async def run() -> float:
        stopping = asyncio.Event()
        supervising = asyncio.create_task(
            supervise(config, plan, stopping=stopping, run_over=never(), report=refuse_report)
        )
        while not mark.exists() or not mark.read_text():  # noqa: ASYNC110 - polls a file
            await asyncio.sleep(0.02)
        began_s = time.monotonic()
        stopping.set()
        await asyncio.wait_for(supervising, 60)
        return time.monotonic() - began_s

    return asyncio.run(run()), mark.read_text()


def test_draining_child_is_killed_promptly_when_the_service_is_dead(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening() as server:
        port = port_of(server)
    cluster = config.cluster.model_copy(update={"drain_timeout_s": 50.0})
    config = config.model_copy(update={"cluster": cluster})
    took_s, command = supervised(config, tmp_path, monkeypatch, port)
    assert took_s < 10
    assert "--incarnation 2000" in command  # the plan's first incarnation


def test_child_drains_until_its_timeout_while_the_service_listens(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = config.cluster.model_copy(update={"drain_timeout_s": 3.0})
    config = config.model_copy(update={"cluster": cluster})
    with listening() as server:
        took_s, _ = supervised(config, tmp_path, monkeypatch, port_of(server))
    assert took_s >= 3.0


# --- files -------------------------------------------------------------------------------------


def test_run_folder_files_are_written_atomically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(path=tmp_path)
    folder.write(folder.attempt, json.dumps({"attempt": 1}))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        folder.write(folder.attempt, json.dumps({"attempt": 2}))
    assert json.loads(folder.attempt.read_text()) == {"attempt": 1}


@pytest.fixture
def disk_operations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Recorded flush and rename operations, in order."""
    operations: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def recording_fsync(descriptor: int) -> None:
        operations.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def recording_replace(path: Path, target: Path) -> Path:
        operations.append(f"rename {path.name} {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "replace", recording_replace)
    return operations


def test_run_folder_file_and_its_directory_entry_are_flushed(
    tmp_path: Path, disk_operations: list[str]
) -> None:
    """If an attempt number were lost in a power failure, it would be assigned twice."""
    folder = RunFolder(path=tmp_path)
    folder.write(folder.attempt, "{}")
    written = ["flush .attempt.json.partial", "rename .attempt.json.partial attempt.json"]
    assert disk_operations == [*written, f"flush {tmp_path.name}"]


def test_configuration_of_a_new_run_is_flushed_before_it_starts(
    config: Config, begin, disk_operations: list[str]
) -> None:
    begin()
    assert disk_operations[:4] == [
        "flush .config.json.partial",
        "rename .config.json.partial config.json",
        "flush run",
        f"flush {Path(config.run.folder).parent.name}",
    ]
