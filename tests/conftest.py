"""Fixtures of all tests."""

import gc
import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _default_hangup() -> None:
    """Runs that tests start react to SIGHUP, also when the tests themselves run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Importing the tests imports torch and transformers. The garbage collector would traverse
    their objects again and again, now and during the tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
