"""Addresses as they are printed, and as the commands take them."""

import pytest
from run_process import start_actor, start_train

from speed_async.cli import _host_and_port
from speed_async.launcher.ports import address_at


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1", "node-7"])
def test_a_printed_address_is_one_that_the_commands_take(host: str) -> None:
    assert _host_and_port(address_at(host, 4711)) == (host, 4711)


def test_an_actor_joins_a_run_at_the_ipv6_address_that_it_prints(tmp_path) -> None:
    run = start_train(tmp_path, "--cluster.host", "::1", "--run.updates", "60")
    try:
        run.wait_for_steps(2)
        with run.slowly():
            joined = start_actor(run, "--run-folder", "joined")
            run.wait_for("it", lambda: run.events("step")[-1]["actors_alive"] == 2)
        for one in (run, joined):
            status, _, err = one.finish()
            assert status == 0, err
    finally:
        run.kill()
