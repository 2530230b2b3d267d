"""Whole runs over CURVE, where every client needs a key; and a run with a trap for unpickling."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from speed_async.config.schema import ClusterConfig
from speed_async.transport import messages as m
from speed_async.transport.curve import load_client_keys
from speed_async.transport.key_making import add_client, make_keys
from speed_async.transport.zeromq import open_link
from speed_async.types import ActorCounts
from tests.fakes.pickle_trap import SITECUSTOMIZE
from tests.fakes.run_process import Run, own_address, start_actor, start_train


def start_console(run: Run, keys: Path) -> Run:
    command = [sys.executable, "-m", "speed_async", "console", run.address("metrics feed at")]
    process = subprocess.Popen(
        [*command, "--keys", str(keys)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Run(process=process, folder=run.folder)


def test_run_between_hosts_accepts_only_clients_with_keys(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    late = add_client(tmp_path / "keys", "late")
    make_keys(tmp_path / "strange")
    host = own_address()
    assert ClusterConfig(host="192.0.2.1").uses_curve
    run = start_train(
        tmp_path,
        *("--cluster.host", host, "--cluster.keys", "keys", "--run.updates", "150"),
        *("--cluster.security", "auto" if host != "127.0.0.1" else "curve"),
    )
    try:
        run.wait_for_steps(2)
        with run.slowed_down():
            console = start_console(run, late)
            joined = start_actor(run, "--keys", str(late), "--run-folder", "joined")
            rejected = [
                start_actor(run, "--timeout", "2", *options)
                for options in ((), ("--keys", str(tmp_path / "strange")))
            ]
            for one in rejected:
                status, _, err = one.finish()
                assert (status, len(err.splitlines())) == (1, 1)
                assert err.startswith(f"error: waited 2.0 s for a run at tcp://{host}:")
                assert "a run with keys replies to allowed clients only" in err
            run.wait_for("the actor", lambda: run.events("step")[-1]["actors_alive"] == 2)
        os.kill(run.child("service"), signal.SIGKILL)  # it restarts with the same keys and ports
        for one in (run, joined, console):
            status, out, err = one.finish()
            assert status == 0, err
        assert any(line.startswith("step ") for line in out.splitlines())
        summary = run.summary()
        assert summary["ledger"]["closes"] is True
        assert summary["optimizer_updates"] == 150
        assert summary["actors"]["actor-2.0"]["tokens_generated"] > 0
        assert run.processes() == {}
    finally:
        for process_id in run.processes():
            os.kill(process_id, signal.SIGKILL)
        run.process.kill()
        run.process.wait()


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


def test_another_allowed_key_cannot_impersonate_a_peer(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    late = add_client(tmp_path / "keys", "late")
    run = start_train(
        tmp_path,
        *("--cluster.keys", "keys", "--cluster.security", "curve", "--run.updates", "60"),
    )
    try:
        run.wait_for_steps(2)
        host, _, port = run.address("actors join at").removeprefix("tcp://").rpartition(":")
        reasons = asyncio.run(impersonate(host, int(port), late))
        assert [reason.partition(" ")[0] for reason in reasons] == ["the"] * 3 + ["actor-1", "this"]
        assert all("another key" in reason for reason in reasons[:4])
        status, _, err = run.finish()
        assert status == 0, err
        summary = run.summary()
        assert summary["optimizer_updates"] == 60
        assert summary["ledger"]["closes"] is True
        assert list(summary["actors"]) == ["actor-1.0"]
        assert not summary["actors"]["actor-1.0"]["lost"]
        assert (summary["messages_refused"], summary["peers_muted"]) == (5, 5)
    finally:
        run.kill()


def test_run_unpickles_nothing_and_survives_completions_that_kill_their_verifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    log = tmp_path / "trap.log"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setenv("TRAP_LOG", str(log))
    monkeypatch.setenv("TRAP_KILLS", "1")
    run = start_train(tmp_path, "--run.updates", "8")
    status, _, err = run.finish()
    assert status == 0, err
    summary = run.summary()
    assert summary["ledger"]["closes"] is True
    assert (summary["messages_refused"], summary["peers_muted"]) == (0, 0)
    lines = log.read_text().splitlines()
    assert [line for line in lines if "TRAPPED" in line] == []
    assert {line.split()[0] for line in lines} == {"actor"}  # results of its own verifiers
    lines = (run.folder / "failed" / "actor-1.jsonl").read_text().splitlines()
    failed = [json.loads(line) for line in lines]
    assert len(failed) == summary["ledger"]["failures"]["verifier"] > 0
    fatal = [record for record in failed if record["prompt_id"] % 16 == 0]
    assert len(failed) - 1 <= len(fatal)  # pebble may attribute a repeated crash to another task
    for record in fatal:
        assert len(record["completions"]) == 2
        assert "ended its worker process" in record["error"]
