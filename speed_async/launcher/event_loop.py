"""The event loop of a process (uvloop if installed, else asyncio), and its stop signals."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from threading import Timer
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


async def ending_in_time(
    main: Coroutine[Any, Any, T], *, grace_s: float, end: Callable[[Exception], int]
) -> T:
    """`main`. If it raises, the process exits at the latest `grace_s` later, with the status that
    `end` returns for the error.

    Otherwise the event loop waits for all threads that it started. One that is in a collective
    operation with a rank on a host that has disappeared waits until the timeout of the operation,
    and nothing else ends it: to abort a group of gloo wakes only its other members.
    """
    try:
        return await main
    except Exception as error:
        failure = error

        def exit_now() -> None:
            status = end(failure)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

        timer = Timer(grace_s, exit_now)
        timer.daemon = True
        timer.start()
        raise


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
