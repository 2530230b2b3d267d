"""Addresses as they are printed, and as the commands accept them."""

import pytest

from speed_async.launcher.ports import address_at, host_and_port
from tests.fakes.run_process import start_actor, start_train


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1", "node-7"])
def test_printed_address_is_accepted_by_the_commands(host: str) -> None:
    assert host_and_port(address_at(host, 4711)) == (host, 4711)


def test_actor_joins_at_the_printed_ipv6_address(tmp_path) -> None:
    run = start_train(tmp_path, "--cluster.host", "::1", "--run.updates", "60")
    try:
        run.wait_for_steps(2)
        with run.slowed_down():
            joined = start_actor(run, "--run-folder", "joined")
            run.wait_for("the actor", lambda: run.events("step")[-1]["actors_alive"] == 2)
        for one in (run, joined):
            status, _, err = one.finish()
            assert status == 0, err
    finally:
        run.kill()
