"""The drill's own parts: a witness that sees what is wrong, and faults that do what they say."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from chaos.disk import LimitedFiles, SmallDisk, small_disk
from chaos.faults import KINDS, plan
from chaos.proxy import Proxy, is_listened_at
from chaos.targets import MARK, Targets
from chaos.traces import read_traces
from chaos.witness import judge_ended, judge_so_far
from speed_async.types import ActorCounts
from speed_async.wire import messages as m
from speed_async.wire.inprocess import InProcessHub
from speed_async.wire.tap import digest_of, tapped

# --- the plan ----------------------------------------------------------------------------------


def test_a_seed_decides_the_whole_plan_and_every_kind_comes_once_before_any_comes_twice() -> None:
    faults = plan(7, 2 * len(KINDS))
    assert faults == plan(7, 2 * len(KINDS)) != plan(8, 2 * len(KINDS))
    assert {fault.kind for fault in faults[: len(KINDS)]} == set(KINDS)
    assert any(fault.overlaps for fault in faults)
    assert not faults[0].overlaps


# --- the witness -------------------------------------------------------------------------------


def sent(number: int, group: str = "", tokens: int = 10) -> dict[str, Any]:
    fields = {"end": "group", "group": group} if group else {"end": "screened_out"}
    return {"kind": "sent", "number": number, "tokens": tokens, "generated": 10 * number, **fields}


def trained(version: int, *groups: str) -> dict[str, Any]:
    return {
        "kind": "trained",
        "number": version,
        "policy_version": version,
        "groups": list(groups),
        "tokens": 10 * len(groups),
        "skipped": False,
    }


HEARD_ALL = {"kind": "heard", "number": 99}
GOOD_ACTOR = [sent(1, "a"), sent(2, "b"), sent(3), sent(4, "c"), HEARD_ALL]
GOOD_LEARNER = [trained(1, "a"), trained(2, "b")]


def write_run(folder: Path, actor: list[dict], learner: list[dict], **groups: int) -> None:
    """Traces, and the files of a run of two updates whose books say what `groups` say."""
    (folder / "trace").mkdir(parents=True)
    for name, lines in (("actor-1.0", actor), ("learner", learner)):
        texts = [json.dumps({"time_s": float(at), **line}) for at, line in enumerate(lines)]
        (folder / "trace" / f"{name}-1.jsonl").write_text("".join(f"{text}\n" for text in texts))
    ends = ["trained", "stale", "evicted", "screened_out", "failed", "buffered", "in_training"]
    book = dict.fromkeys([*ends, "in_flight", "evaluation"], 0)
    book |= {"generated": 4, "trained": 2, "screened_out": 1, "buffered": 1} | groups
    ledger = {"closes": True, "checks": {}, "groups": book}
    ledger["tokens"] = {"trained": 20, "generated": 40}
    (folder / "summary.json").write_text(json.dumps({"policy_version": 2, "ledger": ledger}))
    events = [{"kind": "step", "policy_version": 2}, {"kind": "end", "ok": True}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))


def findings(folder: Path, **wrong: Any) -> str:
    actor, learner = wrong.pop("actor", GOOD_ACTOR), wrong.pop("learner", GOOD_LEARNER)
    write_run(folder, actor, learner, **wrong)
    return "; ".join(judge_ended(folder / "trace", folder, 2).findings)


def test_the_witness_has_nothing_to_say_of_a_run_that_kept_its_promises(tmp_path: Path) -> None:
    assert findings(tmp_path) == ""


def test_the_witness_sees_a_group_trained_twice(tmp_path: Path) -> None:
    assert "trained twice: versions 1, 2" in findings(
        tmp_path, learner=[trained(1, "a"), trained(2, "a")]
    )


def test_an_update_that_was_rolled_back_counts_for_nothing(tmp_path: Path) -> None:
    rolled_back = [trained(1, "a"), trained(2, "c"), trained(2, "b")]
    assert findings(tmp_path, learner=rolled_back) == ""
    taken_back_and_lost = [trained(1, "c"), trained(2, "b"), trained(1, "a")]
    assert "not each of 1 to 2" in findings(tmp_path / "lost", learner=taken_back_and_lost)


def test_the_witness_sees_a_group_that_was_accepted_and_lost(tmp_path: Path) -> None:
    assert "1 are lost, such as ['c']" in findings(tmp_path, buffered=0, generated=3)


def test_a_group_that_the_service_never_confirmed_may_be_missing(tmp_path: Path) -> None:
    unheard = [*GOOD_ACTOR[:3], {"kind": "heard", "number": 3}, GOOD_ACTOR[3]]
    assert findings(tmp_path, actor=unheard, buffered=0, generated=3) == ""


def test_the_witness_sees_groups_from_nowhere_and_books_that_are_made_up(tmp_path: Path) -> None:
    learner = [trained(1, "a"), trained(2, "z")]
    assert "trained z, which nobody sent" in findings(tmp_path / "0", learner=learner)
    assert "as screened_out" in findings(tmp_path / "1", screened_out=2, generated=5)
    assert "3 groups as trained" in findings(tmp_path / "2", trained=3, generated=5)
    assert "9 groups were granted" in findings(tmp_path / "3", generated=9)


def test_the_witness_s_first_look_needs_no_summary(tmp_path: Path) -> None:
    write_run(tmp_path, GOOD_ACTOR, [trained(1, "a"), trained(2, "a")])
    assert len(judge_so_far(read_traces(tmp_path / "trace"))) == 1


# --- the tap -----------------------------------------------------------------------------------


def finished_group(number: int) -> m.GroupFinished:
    return m.GroupFinished(
        number=number,
        counts=ActorCounts(tokens_generated=5),
        lease_id=3,
        prompt_id=1,
        num_screening=1,
        prompt_token_ids=np.array([7], np.int32),
        lengths=np.array([2, 1], np.int32),
        rewards=np.array([0, 1], np.float32),
        cut=np.zeros(2, np.int32),
        token_ids=np.array([4, 5, 6], np.int32),
        logprobs=np.zeros(3, np.float32),
        policy_versions=np.zeros(3, np.int32),
    )


def test_both_ends_know_a_group_by_the_same_digest_and_a_message_sent_again_counts_once(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        hub = InProcessHub()
        actor = tapped(hub.connect("actor-1.0"), str(tmp_path), "actor-1.0")
        learner = tapped(hub.connect("learner"), str(tmp_path), "learner")
        message = finished_group(1)
        for _ in range(2):
            await actor.send(message)
        await hub.send("actor-1.0", m.Welcome(policy_version=0, heard=1))
        await actor.receive(1.0)
        fields = {name: getattr(message, name) for name in m.BatchGroup.__slots__}
        await hub.send("learner", m.BatchGroup(**fields | {"number": 1, "heard": 0}))
        await hub.send("learner", m.BatchReady(policy_version=0, lease_ids=[3]))
        for _ in range(2):
            await learner.receive(1.0)
        await learner.send(
            m.Trained(
                policy_version=1,
                lease_ids=[3],
                skipped=False,
                groups_trained=1,
                completions_trained=2,
                tokens_trained=3,
                metrics={},
            )
        )
        for link in (actor, learner):
            await link.close()

    asyncio.run(run())
    traces = read_traces(tmp_path)
    [actor], [update], [batch] = traces.actors, traces.updates, traces.batches
    assert [line["group"] for line in actor.sent] == [digest_of(finished_group(1))]
    assert actor.is_accepted(actor.sent[0])
    assert update.groups == batch["groups"] == [actor.sent[0]["group"]]
    assert update.tokens == 3


# --- the proxy ---------------------------------------------------------------------------------


@contextmanager
def echoing() -> Iterator[tuple[Proxy, socket.socket]]:
    """A proxy before an echo, and a connection through it that works."""
    command = [sys.executable, "-c", ECHO]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as echo:
        try:
            assert echo.stdout is not None
            with Proxy(int(echo.stdout.readline())) as proxy, connected(proxy) as client:
                assert said_back(client)
                yield proxy, client
        finally:
            echo.kill()


ECHO = """
import asyncio
async def echo(reader, writer):
    while chunk := await reader.read(1000):
        writer.write(chunk)
async def main():
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def connected(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10.0)


def said_back(client: socket.socket, timeout_s: float = 10.0) -> bool:
    client.settimeout(timeout_s)
    try:
        client.sendall(b"hello")
        return client.recv(5, socket.MSG_WAITALL) == b"hello"
    except OSError:
        return False


def test_a_cut_resets_what_is_open_and_new_connections_work() -> None:
    with echoing() as (proxy, client):
        proxy.cut()
        assert not said_back(client)
        with connected(proxy) as another:
            assert said_back(another)


def test_refused_links_close_at_once_until_they_are_restored() -> None:
    with echoing() as (proxy, client):
        proxy.refuse()
        assert not said_back(client)
        with connected(proxy) as another:
            assert not said_back(another)
        proxy.restore()
        with connected(proxy) as another:
            assert said_back(another)


def test_a_stalled_link_keeps_every_byte_for_later() -> None:
    with echoing() as (proxy, client):
        proxy.stall()
        assert not said_back(client, timeout_s=0.2)
        proxy.restore()
        client.settimeout(10.0)
        assert client.recv(5, socket.MSG_WAITALL) == b"hello"


def test_a_delay_is_latency_both_ways_and_ends() -> None:
    with echoing() as (proxy, client):
        proxy.delay(0.15)
        began_s = time.monotonic()
        assert said_back(client)
        assert time.monotonic() - began_s >= 0.3
        proxy.restore()
        began_s = time.monotonic()
        assert said_back(client)
        assert time.monotonic() - began_s < 0.3


def test_nobody_listens_at_the_proxy_while_nobody_is_behind_it() -> None:
    with socket.socket() as service:
        service.bind(("127.0.0.1", 0))
        with Proxy(service.getsockname()[1]) as proxy:
            wait_until(lambda: not is_listened_at(proxy.port))
            service.listen()
            wait_until(lambda: is_listened_at(proxy.port))


def wait_until(happened: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + 10.0
    while not happened():
        assert time.monotonic() < ends_s


# --- the disk ----------------------------------------------------------------------------------


def test_a_full_disk_takes_no_byte_and_a_freed_one_does(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4 * 1024 * 1024) as disk:
        check_full_and_free(disk)
    assert not (tmp_path / "disk" / "file").exists() or isinstance(disk, LimitedFiles)


def test_without_a_disk_of_its_own_a_limit_on_files_does_the_same(tmp_path: Path) -> None:
    check_full_and_free(LimitedFiles(tmp_path))


def check_full_and_free(disk: SmallDisk | LimitedFiles) -> None:
    """A process that appends whenever it is asked to, and says whether that went well."""
    command = [sys.executable, "-c", APPEND, str(disk.folder / "file")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as writer:  # type: ignore[call-overload]

        def appends() -> str:
            writer.stdin.write("go\n")
            writer.stdin.flush()
            return writer.stdout.readline().strip()

        try:
            assert appends() == "ok"
            disk.fill([writer.pid])
            assert appends() in ("ENOSPC", "EFBIG")
            disk.free([writer.pid])
            assert appends() == "ok"
        finally:
            writer.kill()


APPEND = """
import errno, os, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for _ in sys.stdin:
    try:
        print("ok" if os.write(file, bytes(8192)) == 8192 else "short", flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""


# --- the processes -----------------------------------------------------------------------------


def test_processes_are_found_by_their_mark_whoever_started_them_and_ended(tmp_path: Path) -> None:
    inner = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    environment = os.environ | {MARK: str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", inner], env=environment, stdin=subprocess.PIPE
    ) as process:
        targets = Targets(mark=str(tmp_path))
        try:
            while len(targets.commands()) < 2:
                assert process.poll() is None
            assert process.pid in targets.commands()
            assert targets.all() == {}
        finally:
            targets.end_all()
        assert process.wait() == -signal.SIGKILL
        assert targets.commands() == {}
