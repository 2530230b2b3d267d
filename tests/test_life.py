"""How a run goes on: what may be changed, who has its folder, what tells its lives apart."""

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
from speed_async.launcher.attempt import Ports, begin_attempt, check_resumable, remember_ports
from speed_async.launcher.ports import becomes_free, listens
from speed_async.launcher.roles.supervisor import ActorPlan, supervise
from speed_async.launcher.run_folder import RunFolder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return build_config(
        {
            "run": {"folder": str(tmp_path / "run"), "updates": 9},
            "model": {"path": str(model)},
            "task": {"name": "arithmetic", "options": {"a": 1}},
            "cluster": {"actors": 2},
        }
    )


@pytest.fixture
def begin(config: Config) -> Callable[..., object]:
    """Begins a life and, as its process's end would, lets go of the folder again."""

    def begin(of: Config = config, *, begun_in: Path | None = None, resume: bool = False):
        life = begin_attempt(of, begun_in=begun_in, resume=resume)
        os.close(life.lock)
        return life

    return begin


# --- what may be changed -----------------------------------------------------------------------


def test_a_resumed_run_has_its_own_configuration_under_the_overrides(config: Config, begin) -> None:
    begin()
    folder = Path(config.run.folder)
    overrides = ["--run.updates", "20", "--learner.lr", "1e-4", "--buffer.durability", "every"]
    resumed = load_resumed(folder, overrides)
    assert (resumed.run.updates, resumed.learner.lr) == (20, 1e-4)
    assert resumed.buffer.durability == "every"
    assert resumed.model == config.model
    assert load_resumed(folder) == config


def test_a_run_folder_that_was_moved_is_resumed_where_it_is(
    config: Config, begin, tmp_path: Path
) -> None:
    begin()
    Path(config.run.folder).rename(tmp_path / "moved")
    assert load_resumed(tmp_path / "moved").run.folder == str(tmp_path / "moved")


@pytest.mark.parametrize(
    ("override", "field", "said"),
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
def test_what_the_journal_rests_on_cannot_be_changed(
    config: Config, begin, override: list[str], field: str, said: str
) -> None:
    begin()
    with pytest.raises(ConfigError) as caught:
        load_resumed(Path(config.run.folder), override)
    assert caught.value.field == field
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_holds_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpeedAsyncError, match=r"not a run folder.*give a run folder"):
        load_resumed(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SpeedAsyncError, match="cannot be read"):
        load_resumed(tmp_path)


# --- lives -------------------------------------------------------------------------------------


def test_each_life_has_the_folder_of_the_first_and_the_next_number(config: Config, begin) -> None:
    first = begin()
    assert (first.number, first.checkpoint, first.resume_banner()) == (0, None, [])
    longer = config.model_copy(update={"run": config.run.model_copy(update={"updates": 11})})
    second = begin(longer, resume=True)
    assert (second.number, second.folder) == (1, first.folder)
    assert second.resume_banner() == [f"resuming {first.folder.path} from its start (life 1)\n"]
    assert read_resolved(first.folder.config) == longer  # what children read
    restarted = begin(config, begun_in=first.folder.path)
    assert (restarted.number, restarted.config) == (2, longer)  # not the file it was started with
    fresh = begin()
    assert (fresh.number, fresh.folder.path.name) == (0, "run-2")


def test_a_restart_takes_the_number_of_actors_that_torchrun_gives_it(config: Config, begin) -> None:
    first = begin()
    cluster = config.cluster.model_copy(update={"actors": 5})
    grown = begin(config.model_copy(update={"cluster": cluster}), begun_in=first.folder.path)
    assert grown.config.cluster.actors == 5


def test_a_run_made_before_lives_were_counted_goes_on_in_its_second(config: Config, begin) -> None:
    (begin().folder.path / "life.json").unlink()
    assert begin(resume=True).number == 1


def test_a_damaged_number_is_an_error_with_a_remedy(config: Config, begin) -> None:
    (begin().folder.path / "life.json").write_text("{")
    with pytest.raises(SpeedAsyncError, match=r"life\.json' is damaged.*write"):
        begin(resume=True)


def test_a_run_under_way_is_refused_until_its_process_is_gone(config: Config, begin) -> None:
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
        with pytest.raises(SpeedAsyncError, match="is under way: stop it first"):
            attempt()
    holder.kill()
    holder.wait()
    check_resumable(config)
    assert begin(resume=True).number == 1


def test_no_child_inherits_the_lock(config: Config) -> None:
    life = begin_attempt(config, begun_in=None, resume=False)
    command = [sys.executable, "-c", "input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, close_fds=False)
    try:
        os.close(life.lock)
        # The kernel lets a parent go on a moment before it closes the child's descriptors.
        os.close(life.folder.take_lock(5.0))
    finally:
        child.kill()
        child.wait()


def under(config: Config, **run: object) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update=run)})


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MADE = {"completed": True, "policy_version": 9, "accuracy_reached": None}
REACHED = {"completed": True, "policy_version": 4, "accuracy_reached": 0.75}


@pytest.mark.parametrize(
    ("summary", "target", "said"),
    [
        (MADE, None, "it has made its 9 updates; to train on, add a larger --run.updates"),
        (MADE, 0.9, "it has made its 9 updates; to train on, add a larger --run.updates"),
        (
            REACHED,
            0.75,
            "accuracy 0.750 was reached at version 4; to train on, add a higher "
            "--run.stop_at_accuracy",
        ),
        (
            MADE | {"outcome": "nothing_learned", "reason": "nothing was learned: of 9 updates"},
            None,
            "it has made its 9 updates; to train on, add a larger --run.updates (it ended so: "
            "nothing was learned: of 9 updates)",
        ),
    ],
)
def test_a_run_that_came_to_its_end_is_finished_and_left_as_it_is(
    config: Config, begin, summary: dict[str, object], target: float | None, said: str
) -> None:
    folder = begin().folder
    folder.write_summary(summary)
    before = content(folder.path)
    config = under(config, stop_at_accuracy=target)
    for attempt in (
        lambda: check_resumable(config),
        lambda: begin(config, resume=True),
        lambda: begin(config, resume=True),  # the lock was let go
    ):
        with pytest.raises(RunFinished) as caught:
            attempt()
        assert str(caught.value) == f"the run in '{folder.path}' is finished: {said}"
    assert content(folder.path) == before


@pytest.mark.parametrize(
    ("summary", "run"),
    [
        (MADE, {"updates": 10}),
        (REACHED, {"stop_at_accuracy": 0.76}),
        (REACHED, {"stop_at_accuracy": None}),
        (MADE | {"completed": False}, {}),  # stopped, or without its last checkpoint
        ({"policy_version": 9}, {}),
        ([], {}),
    ],
)
def test_a_run_of_which_something_is_left_to_do_goes_on(
    config: Config, begin, summary: dict[str, object], run: dict[str, object]
) -> None:
    begin().folder.write_summary(summary)
    check_resumable(under(config, **run))
    assert begin(under(config, **run), resume=True).number == 1


def test_a_run_that_died_between_its_last_checkpoint_and_its_summary_is_not_finished(
    config: Config, begin
) -> None:
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


def test_a_later_life_takes_the_ports_of_the_one_before_where_it_can(
    config: Config, begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speed_async.launcher.attempt.PORT_GRACE_S", 0.1)
    with listening() as one, listening() as other:
        ports = Ports(service=port_of(one), feed=port_of(other))
    first = begin()
    assert first.ports == Ports(service=0, feed=0)
    remember_ports(first, ports)
    assert begin(resume=True).ports == ports
    with listening(ports.service):
        assert begin(resume=True).ports == Ports(service=0, feed=ports.feed)
    fixed = config.cluster.model_copy(update={"feed_port": 4321})
    asked = begin(config.model_copy(update={"cluster": fixed}), resume=True)
    assert asked.ports == Ports(service=ports.service, feed=0)  # 0: the configuration decides
    elsewhere = config.cluster.model_copy(update={"host": "localhost"})
    assert begin(config.model_copy(update={"cluster": elsewhere}), resume=True).ports == Ports()


def test_a_port_becomes_free_when_its_process_has_gone() -> None:
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


async def never() -> None:
    await asyncio.Event().wait()


def supervised(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int
) -> tuple[float, str]:
    """Have a child that does not heed SIGTERM be stopped. Seconds, and its command line."""
    mark = tmp_path / "started"

    async def start_role(role: str, arguments: list[str], **_: object):
        command = (sys.executable, "-c", HANGS, str(mark), role, *arguments)
        return await asyncio.create_subprocess_exec(*command)

    monkeypatch.setattr("speed_async.launcher.roles.supervisor.start_role", start_role)
    (tmp_path / "logs").mkdir()
    plan = ActorPlan(index=3, host="127.0.0.1", port=port, folder=tmp_path, first_incarnation=2000)

    async def run() -> float:
        stopping = asyncio.Event()
        supervising = asyncio.create_task(
            supervise(config, plan, stopping=stopping, run_over=never())
        )
        while not mark.exists() or not mark.read_text():  # noqa: ASYNC110 - a file of a child
            await asyncio.sleep(0.02)
        began_s = time.monotonic()
        stopping.set()
        await asyncio.wait_for(supervising, 60)
        return time.monotonic() - began_s

    return asyncio.run(run()), mark.read_text()


def test_a_child_that_drains_towards_a_dead_service_is_ended_at_once(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening() as server:
        port = port_of(server)
    cluster = config.cluster.model_copy(update={"drain_timeout_s": 50.0})
    config = config.model_copy(update={"cluster": cluster})
    took_s, command = supervised(config, tmp_path, monkeypatch, port)
    assert took_s < 10
    assert "--incarnation 2000" in command  # its life's


def test_a_child_may_drain_for_its_time_towards_a_service_that_listens(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = config.cluster.model_copy(update={"drain_timeout_s": 3.0})
    config = config.model_copy(update={"cluster": cluster})
    with listening() as server:
        took_s, _ = supervised(config, tmp_path, monkeypatch, port_of(server))
    assert took_s >= 3.0


# --- files -------------------------------------------------------------------------------------


def test_a_file_of_the_run_folder_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(path=tmp_path)
    folder.write(folder.life, json.dumps({"life": 1}))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        folder.write(folder.life, json.dumps({"life": 2}))
    assert json.loads(folder.life.read_text()) == {"life": 1}


@pytest.fixture
def to_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is flushed or renamed, as it happens."""
    story: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        story.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        story.append(f"rename {path.name} {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    return story


def test_a_file_of_the_run_folder_outlives_a_power_cut_and_so_does_its_name(
    tmp_path: Path, to_disk: list[str]
) -> None:
    """A life whose number is lost would be taken for one that was."""
    folder = RunFolder(path=tmp_path)
    folder.write(folder.life, "{}")
    kept = ["flush .life.json.partial", "rename .life.json.partial life.json"]
    assert to_disk == [*kept, f"flush {tmp_path.name}"]


def test_a_new_run_s_configuration_is_on_disk_before_it_begins(
    config: Config, begin, to_disk: list[str]
) -> None:
    begin()
    assert to_disk[:4] == [
        "flush .config.json.partial",
        "rename .config.json.partial config.json",
        "flush run",
        f"flush {Path(config.run.folder).parent.name}",
    ]
