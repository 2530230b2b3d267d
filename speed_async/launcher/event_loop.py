"""The event loop of a process (uvloop if installed, else asyncio), and its stop signals."""

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
    """Signals that drain a run; schedulers send SIGUSR1 or SIGUSR2 before SIGKILL. SIGHUP is
    included unless it is ignored (nohup)."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return signals if ignores_hangup else (*signals, signal.SIGHUP)


def stop_event() -> asyncio.Event:
    """Return an event of the running loop that every stop signal sets."""
    stopping = asyncio.Event()
    for stop_signal in stop_signals():
        asyncio.get_running_loop().add_signal_handler(stop_signal, stopping.set)
    return stopping
