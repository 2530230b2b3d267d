"""One event loop a process: uvloop where it is there, asyncio's elsewhere; and its stop signals."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Signals that ask a run to drain; schedulers warn by SIGUSR1 and SIGUSR2 before they kill.
    SIGHUP is none of them where it is ignored (nohup)."""
    stoppers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return (*stoppers, signal.SIGHUP) if hangs_up else stoppers


def stop_event() -> asyncio.Event:
    """An event of the running loop that every stop signal sets."""
    stopping = asyncio.Event()
    for stopper in stop_signals():
        asyncio.get_running_loop().add_signal_handler(stopper, stopping.set)
    return stopping
