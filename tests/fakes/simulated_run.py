"""A run on a simulated clock: the real service and rollout, and an engine with scripted lengths.

One step of the clock is one decode step of every actor. The learner takes a fixed time for an
update and for the broadcast. Nothing depends on the speed of the machine.
"""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from speed_async.actors.engine import GenerationRequest
from speed_async.actors.lease_result import result_message
from speed_async.actors.rollout import Aborted, LeaseProgress, Rollout
from speed_async.actors.running_leases import RunningLeases
from speed_async.buffer.service import BufferService
from speed_async.config.schema import Config
from speed_async.testing.scripted_engine import ANY_TOKEN_ID, ScriptedStepper
from speed_async.transport import messages as m
from speed_async.transport.groups import unpack_group
from speed_async.types import (
    ActorCounts,
    Group,
    Lease,
    LeaseKind,
    Prompt,
    WeightOffer,
)
from tests.fakes.inline_engine import IdCodec, InlineEngine, LastTokenScorer

SETTLING = 24
"""Iterations of the event loop in which all that a step has finished is scored and resubmitted."""


@dataclass(kw_only=True)
class Outcome:
    lengths_generated: list[int] = field(default_factory=list)
    """Of every completion that was started."""
    lengths_trained: list[int] = field(default_factory=list)
    trained_s: list[float] = field(default_factory=list)
    """End of each update."""
    training_tokens: list[int] = field(default_factory=list)
    """Generated for training by the end of each update."""
    evaluation_tokens: list[int] = field(default_factory=list)
    """Generated for evaluations by the end of each update."""
    end_s: float = 0.0
    waited_s: float = 0.0
    """Time that the learner waited for batches."""

    @property
    def training_s(self) -> float:
        """From the end of the first update to that of the last."""
        return self.trained_s[-1] - self.trained_s[0]


class SimulatedActor:
    def __init__(self, run: "SimulatedRun", index: int) -> None:
        self.name = f"actor-{index}.0"
        self._run = run
        self._rng = {kind: random.Random(index) for kind in LeaseKind}
        stepper = ScriptedStepper(
            self._script,
            num_slots=run.config.actors.num_slots,
            context_length=1 << 20,
            num_token_ids=ANY_TOKEN_ID,
            receive=lambda offer: 0.0,
        )
        self.engine = InlineEngine(stepper)
        self._rollout = Rollout(run.config, self.engine, LastTokenScorer(), IdCodec())
        self._leases = RunningLeases(run.config.gate, run.config.actors.num_slots)
        self._tasks: set[asyncio.Task[None]] = set()

    def _script(self, request: GenerationRequest, num_started: int) -> list[int]:
        has_bound = request.max_staleness is not None
        kind = LeaseKind.TRAINING if has_bound else LeaseKind.EVALUATION
        rng = self._rng[kind]
        length = self._run.lengths[kind](rng)
        if kind is LeaseKind.TRAINING:
            self._run.outcome.lengths_generated.append(length)
        passed = rng.random() < self._run.pass_rates[int(request.prompt_token_ids[0])]
        return [0] * (length - 1) + [int(passed)]

    def counts(self) -> ActorCounts:
        return self._leases.counts(self.engine.stats)

    def request_work(self) -> None:
        if (num_prompts := self._leases.next_request()) is not None:
            self._run.send(self.name, m.WantWork(num_prompts=num_prompts, counts=self.counts()))

    def start(self, leases: m.Leases) -> None:
        for lease_id, prompt_id in zip(leases.lease_ids, leases.prompt_ids, strict=True):
            lease = Lease(
                lease_id=lease_id,
                prompt_id=prompt_id,
                kind=LeaseKind(leases.kind),
                suite=leases.suite,
                num_samples=leases.num_samples,
            )
            work = LeaseProgress(lease=lease)
            self._leases.add(work)
            task = asyncio.get_running_loop().create_task(self._run_lease(work))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run_lease(self, work: LeaseProgress) -> None:
        prompt_id = work.lease.prompt_id
        prompt = Prompt(prompt_id=prompt_id, text=str(prompt_id), answer="")
        result: Group | str | None
        try:
            result = await self._rollout.run(work, prompt)
        except Aborted:
            result = m.STALE
        self._leases.remove(work)
        self._run.send(self.name, result_message(work, result, self.counts()))
        self.request_work()

    async def apply(self, policy_version: int) -> None:
        offer = WeightOffer(
            policy_version=policy_version,
            epoch=1,
            rank=1,
            world_size=2,
            store_host="",
            store_port=0,
            backend="gloo",
            deadline_s=1.0,
        )
        await self.engine.update_weights(offer)
        self._run.send(
            self.name,
            m.WeightsApplied(
                policy_version=policy_version,
                epoch=1,
                pause_s=0.0,
                transfer_s=0.0,
                error="",
                counts=self.counts(),
            ),
        )


class SimulatedRun:
    def __init__(
        self,
        config: Config,
        *,
        length: Callable[[random.Random], int],
        pass_rates: Sequence[float],
        train_s: float,
        sync_s: float = 1.0,
        num_held_out: int = 1,
        suite_sizes: Mapping[str, int] = MappingProxyType({}),
        evaluation_length: Callable[[random.Random], int] | None = None,
    ) -> None:
        """`length` draws the length of a completion, `evaluation_length` that of one of an
        evaluation (None: the same); times are in decode steps. Prompts have the pass rates of their
        ids, in suites too."""
        self.config = config
        self.lengths = {
            LeaseKind.TRAINING: length,
            LeaseKind.EVALUATION: evaluation_length or length,
        }
        self.pass_rates = pass_rates
        self.outcome = Outcome()
        self._train_s, self._sync_s = train_s, sync_s
        self.service = BufferService(
            config,
            num_prompts=len(pass_rates),
            num_held_out=num_held_out,
            suite_sizes=suite_sizes,
            fingerprint="f",
            started_s=0.0,
        )
        self._now_s = 0.0
        self._actors: dict[str, SimulatedActor] = {}
        self._version = 0
        self._groups: list[Group] = []
        self._batch: list[Group] | None = None
        self._due_s: tuple[str, float] | None = None
        self._asked_s: float | None = None
        self._tokens = self._completions = self._num_groups = 0
        self.hangs: dict[str, int] = {}
        """Actors whose engine hangs from this version on."""

    def send(self, peer: str, message: m.Message) -> None:
        self._deliver(self.service.handle(peer, message, self._now_s).messages)

    def _deliver(self, messages: Sequence[tuple[str, m.Message]]) -> None:
        for to, reply in messages:
            if isinstance(reply, m.Rejected):
                raise AssertionError(reply.reason)
            if isinstance(reply, m.Leases):
                self._actors[to].start(reply)
            elif isinstance(reply, m.GroupFinished):
                self._groups.append(unpack_group(reply))
            elif isinstance(reply, m.BatchReady):
                self._batch, self._groups = self._groups, []

    async def execute(self, num_updates: int) -> Outcome:
        self._hello("learner", "learner", 0)
        for index in range(1, self.config.cluster.actors + 1):
            actor = SimulatedActor(self, index)
            self._actors[actor.name] = actor
            self._hello(actor.name, "actor", index)
        for actor in self._actors.values():
            actor.request_work()
        self._take()
        while self._version < num_updates:
            self._now_s += 1
            for actor in self._working_actors():
                actor.engine.step()
            for _ in range(SETTLING):
                await asyncio.sleep(0)
            await self._advance_learner()
            if self._now_s % 32 == 0:
                self._deliver(self.service.tick(self._now_s).messages)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        self.outcome.end_s = self._now_s
        return self.outcome

    def _working_actors(self) -> list[SimulatedActor]:
        return [
            actor
            for actor in self._actors.values()
            if self._version < self.hangs.get(actor.name, self._version + 1)
        ]

    def _hello(self, peer: str, role: str, index: int) -> None:
        hello = m.Hello(role=role, index=index, incarnation=0, fingerprint="f", process_id=1)
        self.send(peer, hello)

    def _take(self) -> None:
        self._asked_s = self._now_s
        take = m.TakeBatch(
            policy_version=self._version, num_groups=self.config.learner.groups_per_update
        )
        self.send("learner", take)

    async def _advance_learner(self) -> None:
        """Start an update when a batch is there, end it, and end its broadcast."""
        if self._batch is not None and self._asked_s is not None:
            if self._version:
                self.outcome.waited_s += self._now_s - self._asked_s
            self._asked_s, self._due_s = None, ("train", self._now_s + self._train_s)
        if self._due_s is None or self._now_s < self._due_s[1]:
            return
        if self._due_s[0] == "train":
            self._trained()
            self._due_s = ("sync", self._now_s + self._sync_s)
            return
        for actor in self._working_actors():
            await actor.apply(self._version)
        for _ in range(SETTLING):
            await asyncio.sleep(0)
        self._published()
        self._due_s = None
        self._take()

    def _trained(self) -> None:
        assert self._batch is not None
        batch, self._batch = self._batch, None
        self._version += 1
        ledger = self.service.lifecycle.ledger
        self.outcome.trained_s.append(self._now_s)
        self.outcome.training_tokens.append(ledger.training_tokens)
        self.outcome.evaluation_tokens.append(ledger.evaluation.tokens)
        for group in batch:
            self._num_groups += 1
            self._completions += len(group.completions)
            self._tokens += group.num_tokens
            self.outcome.lengths_trained += [each.num_tokens for each in group.completions]
        self.send(
            "learner",
            m.Trained(
                policy_version=self._version,
                lease_ids=[group.lease_id for group in batch],
                skipped=False,
                groups_trained=self._num_groups,
                completions_trained=self._completions,
                tokens_trained=self._tokens,
                metrics={},
            ),
        )

    def _published(self) -> None:
        published = m.WeightsPublished(
            policy_version=self._version,
            epoch=1,
            transfer_s=0.0,
            num_bytes=1,
            error="",
            missing=[],
        )
        self.send("learner", published)


def execute(run: SimulatedRun, num_updates: int) -> Outcome:
    return asyncio.run(run.execute(num_updates))
