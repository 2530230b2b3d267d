"""The loop of a follower: executes the lead's commands with its own trainer.

consumes   commands and signs of life of the lead
waits for  the lead's next message (peer deadline; a few seconds after a stop signal)
raises     RoleError when the lead is lost
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from speed_async.errors import DeadlineExceeded, RoleError, SpeedAsyncError
from speed_async.learner.checkpoint.captured import TrainingTensors
from speed_async.learner.parallel.followers import ALIVE_INTERVAL_S
from speed_async.learner.trainer import Trainer
from speed_async.transport import messages as m
from speed_async.transport.following import (
    Alive,
    CaptureShard,
    GatherWeights,
    MeasureCanary,
    RestoreCheckpoint,
    ShardWritten,
    StopFollowing,
    TrainGroups,
    WriteShard,
)
from speed_async.transport.groups import unpack_group
from speed_async.transport.transport import Link
from speed_async.types import Group

STOPPED_SILENCE_S = 5.0
"""After a stop signal, a lead that is silent for this long is lost: it has probably exited."""
LEAD = "learner (rank 0)"


class FollowerLoop:
    def __init__(self, link: Link, *, silence_s: float, stopping: asyncio.Event) -> None:
        """`stopping` is set by a stop signal. The lead has it as well, and decides."""
        self._link = link
        self._silence_s = silence_s
        self._stopping = stopping
        self._commands: asyncio.Queue[m.Message] = asyncio.Queue()

    async def run(self, make_trainer: Callable[[], Trainer]) -> None:
        """Until the lead ends. Raises what failed here, or the loss of the lead."""
        alive = asyncio.create_task(self._send_alive(), name="alive")
        tasks = {
            asyncio.create_task(self._receive(), name="receive"),
            asyncio.create_task(self._work(make_trainer), name="work"),
        }
        done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in (*others, alive):
            task.cancel()
        for task in sorted(done, key=lambda each: each.get_name() == "work"):
            task.result()  # the lead's error first: what fails in the work may be its consequence

    async def _work(self, make_trainer: Callable[[], Trainer]) -> None:
        trainer = await asyncio.to_thread(make_trainer)
        captured: TrainingTensors = {}
        writing = asyncio.create_task(asyncio.sleep(0), name="write")
        while True:
            match await self._commands.get():
                case TrainGroups(num_groups=count):
                    groups = [await self._next_group() for _ in range(count)]
                    await asyncio.to_thread(trainer.update, groups)
                case MeasureCanary():
                    await asyncio.to_thread(trainer.canary)
                case GatherWeights(names=names):
                    await asyncio.to_thread(trainer.whole, names)
                case CaptureShard(copy=copy):
                    await writing
                    captured = {}  # frees what was not written
                    captured = await asyncio.to_thread(trainer.capture_training, copy=copy)
                case WriteShard(folder=folder):
                    write = self._write(trainer, Path(folder), captured)
                    writing, captured = asyncio.create_task(write, name="write"), {}
                case RestoreCheckpoint(folder=folder):
                    await asyncio.to_thread(trainer.restore, Path(folder), is_whole=True)
                case StopFollowing():
                    await writing
                    return
                case other:
                    raise RoleError(LEAD, f"sent an unknown command {type(other).__name__}")

    async def _write(self, trainer: Trainer, folder: Path, captured: TrainingTensors) -> None:
        error = ""
        try:
            await asyncio.to_thread(trainer.write_training, folder, captured)
        except Exception as failure:  # the lead decides, as for its own part
            error = f"{type(failure).__name__}: {failure}"
        await self._link.send(ShardWritten(folder=str(folder), error=error))

    async def _next_group(self) -> Group:
        message = await self._commands.get()
        if not isinstance(message, m.GroupFinished):
            raise RoleError(LEAD, f"sent {type(message).__name__} within a batch")
        return unpack_group(message)

    async def _receive(self) -> None:
        """Queues commands. Receives while a command is executed, to see that the lead is alive."""
        clock = asyncio.get_running_loop().time
        heard_s = clock()
        while True:
            try:
                message = await self._link.receive(1.0)
            except DeadlineExceeded:
                limit_s = STOPPED_SILENCE_S if self._stopping.is_set() else self._silence_s
                if clock() - heard_s > limit_s:
                    text = f"has exited or cannot be reached: nothing received for {limit_s:.0f} s"
                    raise RoleError(LEAD, text) from None
                continue
            heard_s = clock()
            if isinstance(message, StopFollowing) and message.error:
                raise RoleError.from_text(message.error)  # no command is completed any more
            if not isinstance(message, Alive):
                self._commands.put_nowait(message)

    async def _send_alive(self) -> None:
        """Until the link is closed, of which `_receive` reports the reason."""
        with suppress(SpeedAsyncError):
            while True:
                await self._link.send(Alive())
                await asyncio.sleep(ALIVE_INTERVAL_S)
