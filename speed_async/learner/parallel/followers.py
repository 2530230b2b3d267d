"""The lead's side of several learner ranks: commands to the followers, and their loss.

consumes   messages of the followers
waits for  all followers to join (connect deadline), space for a command (stall deadline), their
           replies after a checkpoint (until one is lost)
raises     RoleError naming the follower that failed, is gone, or is silent for too long; RoleError
           when an operation does not advance (stall deadline)
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock

from torch import Tensor
from torch._C._distributed_c10d import Store
from transformers import PreTrainedModel

from speed_async.config.schema import Config
from speed_async.errors import DeadlineExceeded, RoleError
from speed_async.learner.checkpoint.captured import Captured, TrainingTensors
from speed_async.learner.optimizer_update import UpdateResult
from speed_async.learner.parallel.ranks import Ranks
from speed_async.learner.progress import Progress
from speed_async.learner.trainer import Trainer
from speed_async.transport import messages as m
from speed_async.transport.following import (
    Alive,
    CaptureShard,
    Follow,
    GatherWeights,
    LeadPlan,
    MeasureCanary,
    RestoreCheckpoint,
    ShardWritten,
    StopFollowing,
    TrainGroups,
    WriteShard,
)
from speed_async.transport.groups import pack_group
from speed_async.transport.transport import Delivery, Hub
from speed_async.types import ActorCounts, Group
from speed_async.weight_sync.canary_check import Canary

ALIVE_INTERVAL_S = 0.5
NAMING_S = 2.0
"""The loss of one rank makes others fail. After an error, this long passes before one is named."""
STOP_S = 5.0
"""After an error, longest wait for space in the queues of all followers."""
FULL_RETRY_S = 0.01
WRITTEN_POLL_S = 0.05


def follower_name(rank: int) -> str:
    return f"learner-{rank}"


class Followers:
    """Runs in the event loop; `command` and `written` are called in other threads."""

    def __init__(
        self, hub: Hub, store: Store, *, size: int, silence_s: float, timeout_s: float
    ) -> None:
        """`store`: at which the process group meets. `size`: number of learner ranks. `timeout_s`:
        longest time to send a command, and of an operation without progress."""
        self.store = store
        self._hub = hub
        self._names = [follower_name(rank) for rank in range(1, size)]
        self._silence_s = silence_s
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()
        """Held for all messages of a command: another thread's must not come between them."""
        self._closed = False
        self._written: dict[str, dict[str, str]] = {}
        """Replies by folder and follower: its error, or an empty text."""
        self._failures: dict[str, str] = {}
        self._advanced_s: float | None = None
        """When the operation in progress last advanced; None between operations."""
        self._gone: dict[str, str] = {}
        """Followers that are not reachable, the first one first, and how."""

    async def assemble(self, plan: LeadPlan, connect_timeout_s: float) -> None:
        """Sends the plan to each that joins, until all have. Raises DeadlineExceeded."""
        missing, ends_s = set(self._names), self._loop.time() + connect_timeout_s
        while missing:
            for name in set(self._names) - missing:  # they listen for signs of life from now on
                self._hub.offer(name, Alive())
            if (left_s := ends_s - self._loop.time()) <= 0:
                names = ", ".join(sorted(missing))
                raise DeadlineExceeded(names, "its process to start", connect_timeout_s)
            try:
                name, message = await self._hub.receive(min(left_s, ALIVE_INTERVAL_S))
            except DeadlineExceeded:
                continue
            if isinstance(message, Follow) and name in self._names:
                self._hub.offer(name, plan)
                missing.discard(name)
            elif isinstance(message, m.Failure):  # named as soon as `watch` runs
                self._failures.setdefault(name, message.message)

    async def watch(self) -> None:
        """Receives until one follower is lost; then raises RoleError."""
        heard_s = dict.fromkeys(self._names, self._loop.time())
        failed_s, sent_s = 0.0, 0.0
        while True:
            now_s = self._loop.time()
            if now_s - sent_s >= ALIVE_INTERVAL_S:
                sent_s = now_s
                self._find_gone(heard_s, now_s)
            if (self._gone or self._failures) and not failed_s:
                failed_s = now_s
            if failed_s and now_s - failed_s >= NAMING_S:
                raise self._first_error()
            if self._advanced_s is not None and now_s - self._advanced_s > self._timeout_s:
                raise RoleError(
                    "learner",
                    f"a collective operation of the learner ranks has not advanced for "
                    f"{self._timeout_s:.0f} s (cluster.stall_timeout_s): a network or a GPU of "
                    "theirs has probably failed; see logs/learner*.log",
                )
            try:
                name, message = await self._hub.receive(ALIVE_INTERVAL_S / 2)
            except DeadlineExceeded:
                continue
            heard_s[name] = self._loop.time()
            if isinstance(message, m.Failure):
                self._failures.setdefault(name, message.message)
            elif isinstance(message, ShardWritten):
                self._written.setdefault(message.folder, {})[name] = message.error

    @contextmanager
    def operation(self, *messages: m.Message) -> Iterator[None]:
        """A collective operation that begins with this command, and that `watch` times. NCCL has no
        deadline of its own: a rank that waits for a lost network would wait for good."""
        self.command(*messages)
        is_outermost = self._advanced_s is None
        self._advanced_s = self._loop.time()
        try:
            yield
        finally:
            self._advanced_s = None if is_outermost else self._loop.time()

    def advanced(self) -> None:
        """The operation in progress has advanced."""
        if self._advanced_s is not None:
            self._advanced_s = self._loop.time()

    def command(self, *messages: m.Message) -> None:
        """Sends these messages to all followers. Not in the thread of the event loop."""
        asyncio.run_coroutine_threadsafe(self._send(*messages), self._loop).result()

    def written(self, folder: Path) -> list[str]:
        """Waits for the replies of all followers to WriteShard. Returns their errors.

        Raises OSError when a follower is lost.
        """
        waiting = asyncio.run_coroutine_threadsafe(self._all_written(str(folder)), self._loop)
        return waiting.result()

    async def _all_written(self, folder: str) -> list[str]:
        """A disk may take longer than any timeout: `watch` notices a follower that is lost."""
        while len(replies := self._written.get(folder, {})) < len(self._names):
            if self._closed or self._gone or self._failures:
                raise OSError("a learner rank was lost before it had written its part")
            await asyncio.sleep(WRITTEN_POLL_S)
        del self._written[folder]
        return [f"{name}: {error}" for name, error in sorted(replies.items()) if error]

    async def close(self, error: str = "") -> None:
        """Ends the followers that are still there. `error`: why the run failed."""
        self._closed = True
        async with self._sending:
            ends_s = self._loop.time() + (STOP_S if error else self._timeout_s)
            for name in self._names:
                with suppress(RoleError):  # others must hear it after one that is gone
                    await self._offer(name, StopFollowing(error=error), ends_s)
        await self._hub.close()

    async def _send(self, *messages: m.Message) -> None:
        async with self._sending:
            ends_s = self._loop.time() + self._timeout_s
            for name in self._names:
                for message in messages:
                    await self._offer(name, message, ends_s)

    async def _offer(self, name: str, message: m.Message, ends_s: float) -> None:
        while (delivery := self._hub.offer(name, message)) is not Delivery.QUEUED:
            if delivery is Delivery.GONE or self._loop.time() > ends_s:
                self._gone.setdefault(name, "has exited or cannot be reached")
                raise RoleError(name, self._gone[name])
            await asyncio.sleep(FULL_RETRY_S)

    def _find_gone(self, heard_s: dict[str, float], now_s: float) -> None:
        for name in self._names:
            if self._hub.offer(name, Alive()) is Delivery.GONE:
                self._gone.setdefault(name, "has exited or cannot be reached")
            elif now_s - heard_s[name] > self._silence_s:
                self._gone.setdefault(name, f"sent nothing for {self._silence_s:.0f} s")

    def _first_error(self) -> RoleError:
        """Of a follower that disappeared without an error, if there is one: the others failed
        because of it."""
        for name, how in self._gone.items():
            if name not in self._failures:
                return RoleError(name, f"{how}; see logs/{name}.log")
        name, text = next(iter(self._failures.items()))
        return RoleError.from_text(text) if text.startswith(name) else RoleError(name, text)


class LeadTrainer(Trainer):
    """The trainer of rank 0 of several: followers execute every collective operation as well.

    Its methods may be called in several threads.
    """

    def __init__(
        self,
        followers: Followers,
        *,
        config: Config,
        model: PreTrainedModel,
        run_id: str,
        ranks: Ranks,
    ) -> None:
        """Raises ModelError, as Trainer."""
        super().__init__(config=config, model=model, run_id=run_id, ranks=ranks)
        self._followers = followers
        self._order = RLock()
        """Held during a command and its operation, so that all ranks have one order."""
        for policy in self.policies:
            policy.register_forward_hook(lambda *_: followers.advanced())

    def update(
        self, groups: Sequence[Group], before_step: Callable[[], None] = lambda: None
    ) -> UpdateResult:
        packed = [pack_group(group, ActorCounts()) for group in groups]
        before_step()  # a broadcast has collective operations of its own
        with self._order, self._followers.operation(TrainGroups(num_groups=len(packed)), *packed):
            return super().update(groups)

    def canary(self) -> Canary:
        with self._order, self._followers.operation(MeasureCanary()):
            return super().canary()

    def whole(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        with self._order, self._followers.operation(GatherWeights(names=list(names))):
            return super().whole(names)

    def capture(self, *, copy: bool = True) -> Captured:
        with self._order, self._followers.operation(CaptureShard(copy=copy)):
            return super().capture(copy=copy)

    def write_training(self, folder: Path, captured: TrainingTensors) -> None:
        self._followers.command(WriteShard(folder=str(folder)))
        error: OSError | None = None
        try:
            super().write_training(folder, captured)
        except OSError as own:
            error = own
        others = self._followers.written(folder)  # also after an error: then none is left over
        if error is not None:
            raise error
        if others:
            raise OSError("; ".join(others))

    def restore(self, folder: Path, *, is_whole: bool = False) -> Progress:
        with self._order:
            self._followers.command(RestoreCheckpoint(folder=str(folder)))
            return super().restore(folder, is_whole=is_whole)
