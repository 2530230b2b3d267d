"""A whole run over CURVE, where every client needs a key."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from speed_async.config.sections.cluster import ClusterConfig
from speed_async.transport import messages as m
from speed_async.transport.curve import load_client_keys
from speed_async.transport.key_making import add_client, make_keys
from speed_async.transport.zeromq import open_link
from speed_async.types import ActorCounts
from tests.fakes.run_process import Run, own_address, start_actor, start_train
from tests.fakes.slow_task import SLOW


def start_console(run: Run, keys: Path) -> Run:
    command = [sys.executable, "-m", "speed_async", "console", run.address("metrics feed at")]
    process = subprocess.Popen(
        [*command, "--keys", str(keys)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Run(process=process, folder=run.folder)


def test_run_between_hosts_accepts_only_clients_with_keys_and_recovers_its_service(
    tmp_path: Path,
) -> None:
    make_keys(tmp_path / "keys")
    late = add_client(tmp_path / "keys", "late")
    make_keys(tmp_path / "strange")
    host = own_address()
    assert ClusterConfig(host="192.0.2.1").uses_curve
    run = start_train(
        tmp_path,
        *("--cluster.host", host, "--cluster.keys", "keys"),
        *SLOW,
        *("--cluster.security", "auto" if host != "127.0.0.1" else "curve"),
    )
    try:
        run.wait_for_steps(2)
        console = start_console(run, late)
        joined = start_actor(run, "--keys", str(late), "--run-folder", "joined")
        assert_no_reply(run, f"tcp://{host}:")
        assert_no_reply(run, f"tcp://{host}:", "--keys", str(tmp_path / "strange"))
        assert_peers_cannot_be_impersonated(run, late)
        run.wait_for("the actor", lambda: run.events("step")[-1]["actors_alive"] == 2)
        os.kill(run.child("service"), signal.SIGKILL)  # it restarts with the same keys and ports
        run.wait_for_steps(len(run.events("step")) + 5)
        run.interrupt()
        for one, expected in ((run, 130), (joined, 0), (console, 0)):
            status, out, err = one.finish()
            assert status == expected, err
        assert any(line.startswith("step ") for line in out.splitlines())
        summary = run.summary()
        assert summary["ledger"]["closes"] is True
        assert "actor lost" not in summary["ledger"]["failures"]
        assert summary["optimizer_updates"] == len(run.events("step"))
        assert list(summary["actors"]) == ["actor-1.0", "actor-2.0"]
        assert summary["actors"]["actor-2.0"]["tokens_generated"] > 0
        assert not summary["actors"]["actor-1.0"]["lost"]
        assert run.processes() == {}
    finally:
        run.kill()


def assert_no_reply(run: Run, address: str, *options: str) -> None:
    """An actor with these keys gets no answer, and its error names the reason."""
    status, _, err = start_actor(run, "--timeout", "2", *options).finish()
    assert (status, len(err.splitlines())) == (1, 1)
    assert err.startswith(f"error: waited 2.0 s for a run at {address}")
    assert "a run with keys replies to allowed clients only" in err


def assert_peers_cannot_be_impersonated(run: Run, keys: Path) -> None:
    reasons = asyncio.run(impersonate(*run.endpoint("actors join at"), keys))
    assert [reason.partition(" ")[0] for reason in reasons] == ["the"] * 3 + ["actor-1", "this"]
    assert all("another key" in reason for reason in reasons[:4])
    run.wait_for_steps(len(run.events("step")) + 2)
    last = run.events("step")[-1]
    assert (last["messages_refused"], last["peers_muted"]) == (5, 5)


async def impersonate(host: str, port: int, keys: Path) -> list[str]:
    """Try to impersonate the learner and an actor with another allowed key: under their names, and
    as a later incarnation. Returns the reasons of the rejections."""
    hello = m.Hello(role="actor", index=1, incarnation=7, fingerprint="f", process_id=1)
    reasons = []
    for name, message in (
        ("actor-1.0", hello),
        ("actor-1.0", m.Goodbye(counts=ActorCounts())),
        ("learner", m.FinishRun(policy_version=1, evaluate=False, reason="stolen")),
        ("actor-1.7", hello),
        ("actor-1.7", m.Failure(role="actor-1", message="stolen")),
    ):
        link = await open_link(host, port, name, keys=load_client_keys(keys))
        await link.send(message)
        reply = await link.receive(60.0)
        assert isinstance(reply, m.Rejected)
        reasons.append(reply.reason)
        await link.close()
    return reasons
