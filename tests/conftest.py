"""Fixtures of all tests."""

import signal

import pytest


@pytest.fixture(scope="session", autouse=True)
def _default_hangup() -> None:
    """Runs that tests start react to SIGHUP, also when the tests themselves run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
