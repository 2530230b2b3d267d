"""Runs an engine in a separate process, so that sampling does not share the actor's GIL.

The process starts before the actor has an event loop or threads. Both communicate over a socket
pair: when either end dies, the other one detects the closed socket.

| loop | consumes | waits for | unblocked by |
| --- | --- | --- | --- |
| `ProcessWorker._send` | inputs | `wake`, socket buffer space | any call; the process |
| `ProcessWorker.run` | results | a frame | the process, or its death |
| `_serve` | inputs | when idle, an input | its reader thread |
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
from speed_async.actors.stepped_engine.core import EngineCore, IterationInput, IterationResult
from speed_async.actors.stepped_engine.frames import (
    LENGTH,
    frame,
    pack_error,
    pack_input,
    pack_result,
    unpack_error,
    unpack_input,
    unpack_result,
    unpack_stats,
)
from speed_async.actors.stepped_engine.stepper import Stepper
from speed_async.errors import DeadlineExceeded, IncarnationLost, SpeedAsyncError
from speed_async.observability.first_error import LogSince, one_line

STATS_INTERVAL_S = 0.05
"""Interval of count updates while no request finishes."""
END_GRACE_S = 5.0
NVIDIA_DEVICE = Path("/dev/nvidiactl")
FORK, SPAWN = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")


def may_fork(device: str) -> bool:
    """Whether an engine on `actors.device` can be forked, which shares the imported modules.

    CUDA does not survive a fork after any library has queried the GPUs.
    """
    return sys.platform == "linux" and (device == "cpu" or not NVIDIA_DEVICE.exists())


class ProcessWorker:
    """Implements `Worker`. `make_stepper` runs in the process, which starts immediately.

    Create it before the event loop and before any thread, because it may fork. When the process
    dies, IncarnationLost is raised, so that the actor is restarted.
    """

    def __init__(
        self, make_stepper: Callable[[], Stepper], *, load_timeout_s: float, fork: bool
    ) -> None:
        self._load_timeout_s = load_timeout_s
        self._log = LogSince()
        self._socket, actor_end = socket.socketpair()
        arguments = (actor_end, self._socket, make_stepper)
        if fork:
            self.process = FORK.Process(target=_main, args=arguments, daemon=True, name="engine")
        else:
            self.process = SPAWN.Process(target=_main, args=arguments, daemon=True, name="engine")
        self.process.start()
        actor_end.close()
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
        take: Callable[[], IterationInput],
        deliver: Callable[[IterationResult], None],
    ) -> None:
        sender = asyncio.create_task(self._send(wake, take), name="engine-input")
        try:
            while True:
                deliver(unpack_result(await self._receive()))
        finally:
            sender.cancel()

    async def close(self) -> None:
        """The process exits when it detects the closed socket, even during an iteration."""
        if self._writer is None:
            self._socket.close()
        else:
            self._writer.transport.abort()  # close() would flush the buffer first
        await asyncio.to_thread(self.process.join, END_GRACE_S)
        if self.process.is_alive():
            self.process.kill()

    async def _send(self, wake: asyncio.Event, take: Callable[[], IterationInput]) -> None:
        assert self._writer is not None, "call start before run"
        while True:
            await wake.wait()
            wake.clear()
            self._writer.write(frame(pack_input(take())))
            await self._writer.drain()

    async def _receive(self) -> Any:
        try:
            header = await self._reader.readexactly(LENGTH.size)
            value = msgpack.unpackb(await self._reader.readexactly(*LENGTH.unpack(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            await asyncio.to_thread(self.process.join, END_GRACE_S)
            status, cause = _describe_exit(self.process.exitcode), self._log.first_error()
            raise IncarnationLost(
                f"the engine process died ({status}){f': {cause}' if cause else ''}; "
                "see the actor's log"
            ) from None
        if "error" in value:
            raise unpack_error(*value["error"])
        return value


def _describe_exit(exit_code: int | None) -> str:
    if exit_code is None:
        return "it closed its socket"
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit status {exit_code}"


def _main(
    engine_end: socket.socket, actor_end: socket.socket, make_stepper: Callable[[], Stepper]
) -> None:
    """Entry point of the process. Exits when the actor closes its end or dies."""
    actor_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the actor handles the shutdown
    try:
        _serve(engine_end, make_stepper)
    except (BrokenPipeError, ConnectionResetError):
        return
    except SpeedAsyncError as error:
        _send_error(engine_end, error)
    except Exception as error:  # process boundary: log the traceback, report to the actor
        traceback.print_exc()
        text = one_line(f"{type(error).__name__}: {error}")
        _send_error(engine_end, SpeedAsyncError(f"the engine failed: {text}"))


def _serve(engine_end: socket.socket, make_stepper: Callable[[], Stepper]) -> None:
    queued: queue.SimpleQueue[IterationInput] = queue.SimpleQueue()
    # A reader thread drains the socket during long iterations and detects when it closes.
    threading.Thread(target=_read, args=(engine_end, queued), name="input", daemon=True).start()
    core = EngineCore(make_stepper())
    stats = pack_result(_empty_result(core.stats))["stats"]
    engine_end.sendall(frame({"limits": asdict(core.limits), "stats": stats}))
    pending, sent_s = _empty_result(core.stats), time.monotonic()
    while True:
        inputs = _drain_queue(queued, wait=not core.has_work)
        pending = pending.followed_by(core.iterate(inputs))
        now_s = time.monotonic()
        has_results = pending.finished or pending.answers or pending.tokens_cancelled
        if has_results or not core.has_work or now_s - sent_s >= STATS_INTERVAL_S:
            engine_end.sendall(frame(pack_result(pending)))
            pending, sent_s = _empty_result(pending.stats), now_s


def _drain_queue(queued: "queue.SimpleQueue[IterationInput]", *, wait: bool) -> IterationInput:
    """All queued inputs merged into one; with `wait`, blocks for the first."""
    merged = queued.get() if wait else IterationInput()
    while not queued.empty():
        inputs = queued.get()
        merged.arrivals.extend(inputs.arrivals)
        merged.cancelled.extend(inputs.cancelled)
        merged.commands.extend(inputs.commands)
    return merged


def _empty_result(stats: EngineStats) -> IterationResult:
    return IterationResult(finished=[], answers=[], tokens_cancelled=0, stats=stats)


def _read(engine_end: socket.socket, queued: "queue.SimpleQueue[IterationInput]") -> None:
    try:
        with engine_end.makefile("rb") as stream:
            while len(header := stream.read(LENGTH.size)) == LENGTH.size:
                body = stream.read(*LENGTH.unpack(header))
                queued.put(unpack_input(msgpack.unpackb(body)))
    finally:  # an actor killed with unread results resets the connection
        os._exit(0)  # the actor has exited or closed the engine


def _send_error(engine_end: socket.socket, error: SpeedAsyncError) -> None:
    try:
        engine_end.sendall(frame({"error": pack_error(error)}))
    except OSError:
        return  # the actor has exited
