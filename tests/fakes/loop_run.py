"""A whole run in one process: service, actors and learner loop with scripted parts."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speed_async.actors.engine import GenerationRequest
from speed_async.actors.loop import ActorLoop
from speed_async.actors.rollout import Rollout
from speed_async.buffer.server import serve
from speed_async.buffer.service import BufferService
from speed_async.buffer.state_machine import StateMachine
from speed_async.config.schema import Config
from speed_async.environments.task import data_fingerprint
from speed_async.errors import TaskError
from speed_async.learner.checkpoint.best import BestCheckpoints
from speed_async.learner.checkpoint.captured import Captured
from speed_async.learner.inbox import Stop
from speed_async.learner.loop import LearnerLoop
from speed_async.learner.optimizer_update import UpdateResult
from speed_async.learner.progress import Progress, RunResult
from speed_async.learner.trainer import Trainer
from speed_async.observability.metrics import Event
from speed_async.testing.inprocess_transport import InProcessHub
from speed_async.testing.memory_channel import MemoryReceiver, MemorySender, MemoryStore
from speed_async.testing.scripted_engine import ScriptedEngine
from speed_async.transport import messages as m
from speed_async.transport.feed import FeedPublisher
from speed_async.transport.session import SessionLink
from speed_async.types import PASS_REWARD, Group, Int32Array, Prompt, Verdict
from speed_async.weight_sync.canary_check import Canary
from speed_async.weight_sync.channel import NamedTensor, WeightSender

NUM_PROMPTS = 30


class DigitTask:
    """Prompt i is solved by a completion that ends in 1 (i even) or is unsolvable (i odd)."""

    def __init__(self) -> None:
        self.train_prompts = [
            Prompt(prompt_id=i, text=f"p{i}", answer=str(i % 2)) for i in range(NUM_PROMPTS)
        ]
        self.held_out_prompts = [
            Prompt(prompt_id=i, text=f"h{i}", answer="0", held_out=True) for i in range(4)
        ]

    def score(self, prompt: Prompt, completion: str) -> float:
        return float(completion.endswith("1")) if prompt.answer == "0" else 0.0

    def extract(self, completion: str) -> str | None:
        return completion[-1:]


class RecordingSink:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def write(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        """Nothing to close."""


class InlineVerifier:
    """Scores in the event loop after one yield; raises for `broken_prompts`."""

    def __init__(self, task: DigitTask) -> None:
        self.task = task
        self.broken_prompts: set[int] = set()
        self.on_score: Callable[[], Coroutine[Any, Any, None]] | None = None

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Verdict]:
        if not prompt.held_out and prompt.prompt_id in self.broken_prompts:
            raise TaskError(f"the verifier of prompt {prompt.prompt_id} raised")
        await asyncio.sleep(0)
        if self.on_score is not None:
            await self.on_score()
        rewards = [self.task.score(prompt, text) for text in completions]
        return [
            Verdict(reward=reward, passed=reward >= PASS_REWARD, extracted=self.task.extract(text))
            for reward, text in zip(rewards, completions, strict=True)
        ]


SUITE_PROMPTS = [Prompt(prompt_id=i, text=f"s{i}", answer="1", held_out=True) for i in range(3)]


class CharCodec:
    def encode(self, text: str) -> Int32Array:
        return np.array([ord(c) % 50 for c in text], np.int32)

    def decode(self, token_ids: Int32Array) -> str:
        return "".join(map(str, token_ids.tolist()))


def alternate(request: GenerationRequest, num_started: int) -> list[int]:
    """Every second completion ends in 1; lengths vary."""
    return [7] * (num_started % 4) + [num_started % 2]


class CountingUpdates(Trainer):
    """A trainer without a model, which records the groups and has one weight."""

    def __init__(self, act: Callable[[int], None] = lambda n: None) -> None:
        self.batches: list[list[Group]] = []
        self.saved: list[int] = []
        self.best = BestCheckpoints(Path("no-checkpoints"))
        self._act = act

    def update(
        self, groups: Sequence[Group], before_step: Callable[[], None] = lambda: None
    ) -> UpdateResult:
        before_step()
        self.batches.append([*groups])
        self._act(len(self.batches))
        return UpdateResult(
            optimizer_updates=1,
            num_skipped=0,
            skip_reason="",
            tokens=sum(group.num_tokens for group in groups),
            completions=sum(len(group.completions) for group in groups),
            metrics={"loss": 0.0},
        )

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "weight", torch.tensor([float(len(self.batches))])

    def whole(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return dict(self.weights())

    def canary(self) -> Canary:
        return Canary(token_ids=(0, 1), logprobs=(-float(len(self.batches)),))

    def capture(self, *, copy: bool = True) -> Captured:
        return Captured(model={"weight": torch.ones(1)}, training={}, random={})

    def write(self, progress: Progress, captured: Captured) -> None:
        self.saved.append(progress.policy_version)

    def prune(self) -> int:
        return self.saved[-1]


class Run:
    """A whole run in one event loop."""

    def __init__(self, config: Config, num_actors: int = 2) -> None:
        self.config = config
        self.task = DigitTask()
        self.verifier = InlineVerifier(self.task)
        self.sink = RecordingSink()
        self.stop = Stop()
        self.updates = CountingUpdates()
        self.make_sender: Callable[[MemoryStore], WeightSender] = lambda store: MemorySender(
            store, bucket_bytes=1024
        )
        self.num_actors = num_actors
        self.engines: list[ScriptedEngine] = []
        self.canaries: dict[int, Canary | None] = {}
        """The canary received with each version."""
        self.received: dict[int, float] = {}
        """The weight of each version."""
        self.service = BufferService(
            config,
            num_prompts=NUM_PROMPTS,
            num_held_out=4,
            suite_sizes={suite.name: len(SUITE_PROMPTS) for suite in config.evaluate.suites},
            fingerprint=data_fingerprint(self.task, {}),
            started_s=0.0,
        )

    async def execute(self, machine: StateMachine | None = None) -> RunResult:
        """Run to completion; `machine` is a state machine with a journal for this service."""
        hub = InProcessHub()
        feed = FeedPublisher("127.0.0.1", 0)
        store = MemoryStore()
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(
                serve(machine or StateMachine(self.service), hub, feed, [self.sink])
            )
            for index in range(1, self.num_actors + 1):
                tasks.create_task(self._act(hub, index, store))
            link = SessionLink(hub.connect("learner"))
            learner = LearnerLoop(
                self.config,
                link=link,
                trainer=self.updates,
                sender=self.make_sender(store),
                backend="gloo",
                stop=self.stop,
            )
            finished = await learner.run(self._hello("learner", 0))
            await link.close()  # it acknowledges; the service waits for that
            await serving
        return finished

    async def _act(self, hub: InProcessHub, index: int, store: MemoryStore) -> None:
        expected = [("weight", torch.zeros(1))]
        receiver = MemoryReceiver(store)

        def receive(offer: Any) -> float:
            def load(tensors: Sequence[NamedTensor]) -> None:
                self.received[offer.policy_version] = tensors[0][1].item()

            report = receiver.receive(offer, expected, load)
            self.canaries[offer.policy_version] = report.canary
            return report.transfer_s

        engine = ScriptedEngine(alternate, num_slots=self.config.actors.num_slots, receive=receive)
        self.engines.append(engine)
        name = f"actor-{index}"
        link = SessionLink(hub.connect(f"{name}.0"))
        async with engine:
            loop = ActorLoop(
                self.config,
                name=name,
                link=link,
                engine=engine,
                rollout=Rollout(self.config, engine, self.verifier, CharCodec()),
                task=self.task,
                suites={suite.name: SUITE_PROMPTS for suite in self.config.evaluate.suites},
            )
            try:
                await loop.run(self._hello("actor", index))
            finally:
                await link.close()

    def _hello(self, role: str, index: int) -> m.Hello:
        return m.Hello(
            role=role,
            index=index,
            incarnation=0,
            fingerprint=data_fingerprint(self.task, {}),
            process_id=index,
        )


def execute(run: Run) -> RunResult:
    return asyncio.run(asyncio.wait_for(run.execute(), 30))


def make_service(config: Config, task: DigitTask) -> BufferService:
    """A service with the same task and another configuration."""
    return BufferService(
        config,
        num_prompts=NUM_PROMPTS,
        num_held_out=4,
        fingerprint=data_fingerprint(task, {}),
        started_s=0.0,
    )
