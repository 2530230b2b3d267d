"""Whole runs over CURVE: every role and whoever joins needs a key; who has none is told so."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from run_process import Run, start_actor, start_train

from speed_async.config.schema import ClusterConfig
from speed_async.wire.key_making import add_client, make_keys

pytestmark = pytest.mark.timeout(240)


def own_address() -> str:
    """An address of this machine that others can reach; loopback where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: only the route is looked up
            address = str(probe.getsockname()[0])
        except OSError:
            address = "127.0.0.1"
    return address


def start_console(run: Run, keys: Path) -> Run:
    command = [sys.executable, "-m", "speed_async", "console", run.address("metrics feed at")]
    process = subprocess.Popen(
        [*command, "--keys", str(keys)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Run(process=process, folder=run.folder)


def test_a_run_between_hosts_is_for_the_holders_of_keys(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    late = add_client(tmp_path / "keys", "late")
    make_keys(tmp_path / "strange")
    host = own_address()
    assert ClusterConfig(host="192.0.2.1").speaks_curve
    run = start_train(
        tmp_path,
        *("--cluster.host", host, "--cluster.keys", "keys", "--run.updates", "40"),
        *("--cluster.security", "auto" if host != "127.0.0.1" else "curve"),
    )
    try:
        run.wait_for_steps(2)
        with run.slowly():
            console = start_console(run, late)
            joined = start_actor(run, "--keys", str(late), "--run-folder", "joined")
            refused = [
                start_actor(run, "--timeout", "2", *options)
                for options in ((), ("--keys", str(tmp_path / "strange")))
            ]
            for one in refused:
                status, _, err = one.finish()
                assert (status, len(err.splitlines())) == (1, 1)
                assert err.startswith(f"error: waited 2.0 s for a run at tcp://{host}:")
                assert "a run that has keys answers allowed clients alone" in err
            run.wait_for("it", lambda: run.events("step")[-1]["actors_alive"] == 2)
        for one in (run, joined, console):
            status, out, err = one.finish()
            assert status == 0, err
        assert any(line.startswith("step ") for line in out.splitlines())
        summary = run.summary()
        assert summary["ledger"]["closes"] is True
        assert summary["optimizer_updates"] == 40
        assert summary["actors"]["actor-2.0"]["tokens_generated"] > 0
        assert run.processes() == {}
    finally:
        for process_id in run.processes():
            os.kill(process_id, signal.SIGKILL)
        run.process.kill()
        run.process.wait()
