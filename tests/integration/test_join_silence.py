"""`speed-async actor --join` at an address without a run: what it says, and when."""

import socket
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("has_listener", "why"),
    [
        (False, "no process accepts connections there"),
        (True, "a process accepts connections there, which may be another program"),
    ],
)
def test_an_address_without_a_run_is_reported_before_the_timeout_and_at_its_end(
    has_listener: bool, why: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # without listen, connections are refused
        if has_listener:
            taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "speed_async", "actor", "--join", address]
        with subprocess.Popen(
            [*command, "--timeout", "10"], stderr=subprocess.PIPE, text=True
        ) as actor:
            assert actor.stderr is not None
            first = actor.stderr.readline()
            was_waiting = actor.poll() is None
            rest = actor.stderr.read()
    assert was_waiting
    assert first.startswith(f"a run at {address} has not replied: {why}; waiting ")
    assert actor.returncode == 1
    assert rest.startswith(
        f"error: waited 10.0 s for a run at {address}: no reply; {why}. The addr"
    )
