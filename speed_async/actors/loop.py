"""The actor loop: receives leases, runs them concurrently on one engine, reports each result.

consumes   leases, weight offers, drain (from the service)
waits for  engine and verifier (inside each lease), weights (inside the engine)
unblocked by  the service's grants, requested with WantWork
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from speed_async.actors.engine import Engine
from speed_async.actors.lease_result import result_message
from speed_async.actors.reward_report import RewardReport
from speed_async.actors.rollout import Aborted, LeaseProgress, Rollout, UnscoredCompletions
from speed_async.actors.running_leases import RunningLeases
from speed_async.actors.sample_selector import SampleSelector
from speed_async.actors.weight_update import apply_offer
from speed_async.config.schema import Config
from speed_async.config.sections.evaluate import HELD_OUT
from speed_async.environments.task import Task
from speed_async.errors import (
    DeadlineExceeded,
    IncarnationLost,
    ModelError,
    RoleError,
    TaskError,
    WeightSyncError,
)
from speed_async.transport import messages as m
from speed_async.transport.joining import Leaving
from speed_async.transport.session import SessionLink
from speed_async.types import ActorCounts, Group, Lease, LeaseKind, Prompt, WeightOffer

REPORT_INTERVAL_S = 0.5
SAMPLE_INTERVAL_S = 1.0
"""Approximate interval between completion samples, over all actors."""
SERVICE_TIMEOUT_S = 5.0
"""While the actor drains, a service that is silent for this long is considered dead."""
DRAIN_POLL_S = 0.02
EXCERPT_CHARS = 40
"""Length of the prompt excerpt in errors about unusable prompts."""
GOODBYE_TIMEOUT_S = 5.0
LEAVE_GRACE_S = 2.0
"""How long a stopping actor waits for the service's Drain before it drains on its own."""


class ActorLoop:
    def __init__(
        self,
        config: Config,
        *,
        name: str,
        link: SessionLink,
        engine: Engine,
        rollout: Rollout,
        task: Task,
        suites: Mapping[str, Sequence[Prompt]] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`suites`: prompts of each suite of the configuration."""
        self._config = config
        self._name = name
        self._link = link
        self._engine = engine
        self._rollout = rollout
        self._task = task
        self._suites: dict[str, Sequence[Prompt]] = {HELD_OUT: task.held_out_prompts, **suites}
        self._clock = clock
        self._selector = SampleSelector(
            SAMPLE_INTERVAL_S * config.cluster.actors,
            is_gated=config.gate.mode == "screen",
            clock=clock,
        )
        self._leases = RunningLeases(config.gate, config.actors.num_slots)
        self._rewards = RewardReport()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._outbox: asyncio.Queue[m.Message] = asyncio.Queue()
        self._draining = False
        self._drain_requested = asyncio.Event()
        self._drained = asyncio.Event()
        self._update_lock = asyncio.Lock()
        self._loop_lag_s: float | None = None
        self._started_s = clock()

    async def run(self, hello: m.Hello) -> None:
        """Run until the service sends Drain. Raises the error that ends the run."""
        await self._link.send(hello)
        await self._await_welcome()
        try:
            async with asyncio.TaskGroup() as tasks:
                sender = tasks.create_task(self._send_outbox(), name="sender")
                reporter = tasks.create_task(self._report(), name="reporter")
                receiver = tasks.create_task(self._receive(tasks), name="receiver")
                await self._drain_requested.wait()
                await self._drain()
                await self._await_drained()
                reporter.cancel()
                self._enqueue(m.ActorReport(gauges=self._gauges(), counts=self._counts()))
                self._enqueue(m.Goodbye(counts=self._counts()))
                await self._outbox.join()
                await self._link.settle(GOODBYE_TIMEOUT_S)
                sender.cancel()
                receiver.cancel()
        except BaseExceptionGroup as group:
            raise _first_error(group) from None

    async def _await_welcome(self) -> None:
        answer = await self._link.receive(self._config.cluster.connect_timeout_s)
        if isinstance(answer, m.Rejected):
            raise RoleError(self._name, f"the service refused this actor: {answer.reason}")

    def request_drain(self) -> None:
        """Drain on the actor's own initiative (a signal).

        The service is notified first. Weights that it offers before its reply are still received,
        because the other members of the broadcast wait for this actor.
        """
        self._enqueue(Leaving(counts=self._counts()))
        asyncio.get_running_loop().call_later(LEAVE_GRACE_S, self._drain_requested.set)

    # --- incoming messages -----------------------------------------------------------------

    async def _receive(self, tasks: asyncio.TaskGroup) -> None:
        silence_s = self._config.cluster.stall_timeout_s
        while True:
            try:
                message = await self._link.receive(silence_s)
            except DeadlineExceeded:  # without new leases, the service only acknowledges
                if self._clock() - self._link.last_received_s >= silence_s:
                    raise
                continue
            match message:
                case m.Leases():
                    self._start(message, tasks)
                case m.OfferWeights(offer=offer):
                    tasks.create_task(self._apply(offer), name="weights")
                case m.Drain():
                    self._drain_requested.set()
                case m.Abort(role=role, message=text):
                    raise RoleError(role, text)
                case m.Rejected(reason=reason):
                    raise IncarnationLost(f"{self._name}: the service refused a message: {reason}")
                case _:
                    pass
            self._check_drained()

    def _start(self, leases: m.Leases, tasks: asyncio.TaskGroup) -> None:
        kind = LeaseKind(leases.kind)
        for lease_id, prompt_id in zip(leases.lease_ids, leases.prompt_ids, strict=True):
            lease = Lease(
                lease_id=lease_id,
                prompt_id=prompt_id,
                kind=kind,
                suite=leases.suite,
                num_samples=leases.num_samples,
            )
            work = LeaseProgress(lease=lease, stopped=self._draining)
            self._leases.add(work)
            name = f"lease-{lease_id}"
            self._tasks[lease_id] = tasks.create_task(self._run_lease(work), name=name)

    async def _run_lease(self, work: LeaseProgress) -> None:
        lease = work.lease
        evaluation = lease.kind is LeaseKind.EVALUATION
        prompts = self._suites[lease.suite] if evaluation else self._task.train_prompts
        prompt = prompts[lease.prompt_id]
        result: Group | str | None
        try:
            result = await self._rollout.run(work, prompt)
        except Aborted:
            result = m.DRAINED if self._draining else m.STALE
        except asyncio.CancelledError:
            if not self._draining:
                raise
            result = m.DRAINED
        except UnscoredCompletions as error:
            result = str(error)
        except TaskError as error:
            result = f"verifier: {error}"
        except ModelError as error:
            result = f"{m.UNUSABLE}: {error} (prompt starts with {prompt.text[:EXCERPT_CHARS]!r})"
        except (WeightSyncError, DeadlineExceeded):
            async with self._update_lock:  # the service receives WeightsApplied first
                raise
        self._end_lease(work, prompt, result)

    def _end_lease(self, work: LeaseProgress, prompt: Prompt, result: Group | str | None) -> None:
        self._leases.remove(work)
        self._rewards.add(work)
        del self._tasks[work.lease.lease_id]
        self._enqueue(result_message(work, result, self._counts()))
        if not isinstance(result, str):
            self._send_sample(work, prompt)
        self._request_work()
        self._check_drained()

    def _send_sample(self, work: LeaseProgress, prompt: Prompt) -> None:
        """Send one of the lease's completions as a sample, at most once per interval."""
        selected = self._selector.select(work)
        if selected is not None:
            text = self._rollout.text(selected.sampled)
            counts = self._counts()
            self._enqueue(self._selector.message(selected, work, prompt, text, counts))

    # --- outgoing messages -----------------------------------------------------------------

    def _enqueue(self, message: m.Message) -> None:
        """Queue a message. A single sender preserves the order in which counts were taken."""
        self._outbox.put_nowait(message)

    async def _send_outbox(self) -> None:
        while True:
            message = await self._outbox.get()
            await self._link.send(message)
            self._outbox.task_done()

    def _request_work(self) -> None:
        """Request enough prompts to keep the engine's queue non-empty."""
        if self._draining:
            return
        num_prompts = self._leases.next_request()
        if num_prompts is not None:
            self._enqueue(m.WantWork(num_prompts=num_prompts, counts=self._counts()))

    async def _report(self) -> None:
        while True:
            self._request_work()
            self._enqueue(m.ActorReport(gauges=self._gauges(), counts=self._counts()))
            expected_s = self._clock() + REPORT_INTERVAL_S
            await asyncio.sleep(REPORT_INTERVAL_S)
            self._loop_lag_s = self._clock() - expected_s

    def _gauges(self) -> dict[str, float]:
        gauges = self._engine.stats.gauges() | self._rewards.gauges()
        gauges["uptime_s"] = self._clock() - self._started_s
        if self._loop_lag_s is not None:
            gauges["loop_lag_s"] = self._loop_lag_s
        return gauges

    def _counts(self) -> ActorCounts:
        return self._leases.counts(self._engine.stats)

    # --- weight updates and drain ------------------------------------------------------------

    async def _apply(self, offer: WeightOffer) -> None:
        async with self._update_lock:
            applied = await apply_offer(
                self._engine, offer, counts=self._counts, is_draining=lambda: self._draining
            )
            self._enqueue(applied)
            if not applied.usable:
                await self._outbox.join()
                raise WeightSyncError(applied.error)

    async def _drain(self) -> None:
        self._draining = True
        for work in self._leases:
            work.stopped = True
        await self._engine.pause(abort=True)
        for work in self._leases:
            if work.scoring:  # all its samples are counted already
                self._tasks[work.lease.lease_id].cancel()
        self._check_drained()

    async def _await_drained(self) -> None:
        """Wait until every lease has ended and the service has acknowledged the results."""
        deadline_s = self._config.cluster.drain_timeout_s
        ends_s = self._clock() + deadline_s
        while not self._drained.is_set() or self._outbox.qsize() or self._link.num_unacked:
            silent_s = self._clock() - self._link.last_received_s
            if self._clock() > ends_s or silent_s > SERVICE_TIMEOUT_S:
                what = (
                    f"{len(self._leases)} leases running, {self._link.num_unacked} messages "
                    "unacknowledged"
                )
                raise IncarnationLost(
                    f"{self._name} did not drain within {deadline_s:.0f} s: {what}; last message "
                    f"from the service {silent_s:.0f} s ago"
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), DRAIN_POLL_S)
            if self._drained.is_set():
                await asyncio.sleep(DRAIN_POLL_S)

    def _check_drained(self) -> None:
        if self._draining and not self._leases:
            self._drained.set()


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first leaf error of a task group's exception group."""
    first = group.exceptions[0]
    return _first_error(first) if isinstance(first, BaseExceptionGroup) else first
