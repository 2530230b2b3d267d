"""An engine in a process of its own: sampling then shares no interpreter lock with the actor.

It is started before the actor has an event loop or threads, and lives on a socket pair: when either
end dies, the other one sees the socket close.

| loop | consumes | waits for | unblocked by |
| --- | --- | --- | --- |
| `ProcessWorker._send` | inboxes | `wake`, room in the socket | any call; the process |
| `ProcessWorker.run` | results | a frame | the process, also by dying |
| `_serve` | inboxes | when idle, an inbox | its reader thread |
"""

import asyncio
import multiprocessing
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgpack

from speed_async.actors.engine import EngineStats
from speed_async.actors.stepped_engine.admission import ModelLimits
from speed_async.actors.stepped_engine.core import EngineCore, Inbox, TurnResult
from speed_async.actors.stepped_engine.frames import (
    LENGTH,
    frame,
    pack_error,
    pack_inbox,
    pack_result,
    unpack_error,
    unpack_inbox,
    unpack_result,
    unpack_stats,
)
from speed_async.actors.stepped_engine.stepper import Stepper
from speed_async.errors import DeadlineExceeded, GivenUp, SpeedAsyncError
from speed_async.observability.first_error import LogSince, one_line

STATS_INTERVAL_S = 0.05
"""Turns in which nothing ended are told of this often, for their counts."""
END_GRACE_S = 5.0
NVIDIA_DEVICE = Path("/dev/nvidiactl")
FORK, SPAWN = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")


def may_fork(device: str) -> bool:
    """Whether an engine on `actors.device` may be forked: it then shares what was imported. CUDA
    does not survive a fork once a library has as much as counted the GPUs."""
    return sys.platform == "linux" and (device == "cpu" or not NVIDIA_DEVICE.exists())


class ProcessWorker:
    """Implements `Worker`. `make_stepper` runs in the process, which starts at once.

    Make it before the event loop and before any thread: it may fork. A process that dies raises
    GivenUp, so that the actor is started anew.
    """

    def __init__(
        self, make_stepper: Callable[[], Stepper], *, load_timeout_s: float, fork: bool
    ) -> None:
        self._load_timeout_s = load_timeout_s
        self._log = LogSince()
        self._socket, theirs = socket.socketpair()
        arguments = (theirs, self._socket, make_stepper)
        if fork:
            self.process = FORK.Process(target=_main, args=arguments, daemon=True, name="engine")
        else:
            self.process = SPAWN.Process(target=_main, args=arguments, daemon=True, name="engine")
        self.process.start()
        theirs.close()
        self._writer: asyncio.StreamWriter | None = None

    async def start(self) -> tuple[ModelLimits, EngineStats]:
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket)
        try:
            value = await asyncio.wait_for(self._receive(), self._load_timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(
                "the engine process", "loading the model", self._load_timeout_s
            ) from None
        return ModelLimits(**value["limits"]), unpack_stats(value["stats"])

    async def run(
        self,
        wake: asyncio.Event,
        take: Callable[[], Inbox],
        deliver: Callable[[TurnResult], None],
    ) -> None:
        sender = asyncio.create_task(self._send(wake, take), name="engine-inbox")
        try:
            while True:
                deliver(unpack_result(await self._receive()))
        finally:
            sender.cancel()

    async def close(self) -> None:
        """The process ends as soon as it sees the socket closed, in the middle of a turn too."""
        if self._writer is None:
            self._socket.close()
        else:
            self._writer.transport.abort()  # close() would wait to send the rest
        await asyncio.to_thread(self.process.join, END_GRACE_S)
        if self.process.is_alive():
            self.process.kill()

    async def _send(self, wake: asyncio.Event, take: Callable[[], Inbox]) -> None:
        assert self._writer is not None, "run comes after start"
        while True:
            await wake.wait()
            wake.clear()
            self._writer.write(frame(pack_inbox(take())))
            await self._writer.drain()

    async def _receive(self) -> Any:
        try:
            header = await self._reader.readexactly(LENGTH.size)
            value = msgpack.unpackb(await self._reader.readexactly(*LENGTH.unpack(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            await asyncio.to_thread(self.process.join, END_GRACE_S)
            how, cause = _ending(self.process.exitcode), self._log.first_error()
            raise GivenUp(
                f"the engine process died ({how}){f': {cause}' if cause else ''}; "
                "see the actor's log"
            ) from None
        if "error" in value:
            raise unpack_error(*value["error"])
        return value


def _ending(exit_code: int | None) -> str:
    if exit_code is None:
        return "it closed its socket"
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit status {exit_code}"


def _main(ours: socket.socket, theirs: socket.socket, make_stepper: Callable[[], Stepper]) -> None:
    """The process. Ends when the actor closes its end, or dies."""
    theirs.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # runs end by protocol
    try:
        _serve(ours, make_stepper)
    except (BrokenPipeError, ConnectionResetError):
        return
    except SpeedAsyncError as error:
        _tell(ours, error)
    except Exception as error:  # a process's boundary: traced in the log, told to the actor
        traceback.print_exc()
        text = one_line(f"{type(error).__name__}: {error}")
        _tell(ours, SpeedAsyncError(f"the engine failed: {text}"))


def _serve(ours: socket.socket, make_stepper: Callable[[], Stepper]) -> None:
    inboxes: queue.SimpleQueue[Inbox] = queue.SimpleQueue()
    # Reading in a thread keeps the socket empty during long turns, and notices its end.
    threading.Thread(target=_read, args=(ours, inboxes), name="inbox", daemon=True).start()
    core = EngineCore(make_stepper())
    stats = pack_result(_nothing(core.stats))["stats"]
    ours.sendall(frame({"limits": asdict(core.limits), "stats": stats}))
    untold, told_s = _nothing(core.stats), time.monotonic()
    while True:
        untold = untold.followed_by(core.turn(_next(inboxes, wait=not core.has_work)))
        now_s = time.monotonic()
        ended = untold.finished or untold.answers or untold.tokens_cancelled
        if ended or not core.has_work or now_s - told_s >= STATS_INTERVAL_S:
            ours.sendall(frame(pack_result(untold)))
            untold, told_s = _nothing(untold.stats), now_s


def _next(inboxes: "queue.SimpleQueue[Inbox]", *, wait: bool) -> Inbox:
    """All that has arrived, as one inbox; when asked to, waits for the first."""
    merged = inboxes.get() if wait else Inbox()
    while not inboxes.empty():
        inbox = inboxes.get()
        merged.arrivals.extend(inbox.arrivals)
        merged.cancelled.extend(inbox.cancelled)
        merged.commands.extend(inbox.commands)
    return merged


def _nothing(stats: EngineStats) -> TurnResult:
    return TurnResult(finished=[], answers=[], tokens_cancelled=0, stats=stats)


def _read(ours: socket.socket, inboxes: "queue.SimpleQueue[Inbox]") -> None:
    try:
        with ours.makefile("rb") as stream:
            while len(header := stream.read(LENGTH.size)) == LENGTH.size:
                body = stream.read(*LENGTH.unpack(header))
                inboxes.put(unpack_inbox(msgpack.unpackb(body)))
    finally:  # an actor that is killed with results unread resets the connection
        os._exit(0)  # the actor has gone, or wants no more of this process


def _tell(ours: socket.socket, error: SpeedAsyncError) -> None:
    try:
        ours.sendall(frame({"error": pack_error(error)}))
    except OSError:
        return  # nobody is left to be told
