"""The whole system in one process: screen, gate, continue, buffer, train, update weights.

    python examples/minimal_loop.py                 # 20 updates of the quickstart's model
    python examples/minimal_loop.py --updates 80

All parts are the package's own. What several processes need is left out: ZeroMQ, credit, the
journal, restarts. `speed-async train` runs the same loop with them.

The actor tasks and the learner run concurrently. The engine loads new weights between two decode
steps, in the middle of sequences. Each token therefore records its log-probability and the policy
version that sampled it, and the objective corrects for the difference.
"""

import argparse
import asyncio
import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from speed_async.actors.model_folder import load_model_folder, load_tokenizer
from speed_async.actors.prompt_codec import PromptCodec
from speed_async.actors.rollout import Aborted, LeaseProgress, Rollout
from speed_async.actors.stepped_engine.engine import SteppedEngine
from speed_async.actors.stepped_engine.worker import ThreadWorker
from speed_async.actors.torch_engine.generator import TorchGenerator
from speed_async.buffer.curriculum.curriculum import UniformCurriculum, UniformState
from speed_async.buffer.priority import BufferedGroup, PriorityBuffer
from speed_async.config.load import load_config
from speed_async.config.schema import Config
from speed_async.environments.registry import make_task
from speed_async.environments.task import Task
from speed_async.learner.model import load_model
from speed_async.learner.trainer import Trainer
from speed_async.testing.memory_channel import MemoryReceiver, MemorySender, MemoryStore
from speed_async.testing.scripted_verifier import ScriptedVerifier
from speed_async.types import Group, Lease, LeaseKind, WeightOffer

CONFIG = Path(__file__).resolve().parents[1] / "quickstart" / "config.toml"
PROMPTS_IN_FLIGHT = 64


@dataclass
class Counts:
    """Generated tokens by what became of them."""

    screened_out: int = 0
    stale: int = 0
    evicted: int = 0
    trained: int = 0
    pass_rates: list[float] = field(default_factory=list)  # since the last update

    def __str__(self) -> str:
        return (
            f"{self.trained:,} trained, {self.screened_out:,} screened out, {self.stale:,} stale, "
            f"{self.evicted:,} evicted"
        )


class Buffer:
    """Finished groups, best first. The priority buffer orders records; this keeps the groups."""

    def __init__(self, config: Config, counts: Counts) -> None:
        self.counts = counts
        self._groups: dict[int, Group] = {}
        self._order = PriorityBuffer(
            capacity_groups=config.capacity_groups,
            capacity_bytes=config.buffer.capacity_bytes,
            by_signal=config.takes_by_signal,
        )
        self._max_staleness = config.buffer.max_staleness
        self._arrived = asyncio.Event()

    def put(self, group: Group) -> None:
        versions = np.concatenate([c.sampled.policy_versions for c in group.completions])
        self._groups[group.lease_id] = group
        evicted = self._order.insert(
            BufferedGroup(
                message=None,
                lease_id=group.lease_id,
                pass_rate=group.pass_rate,
                oldest_version=int(versions.min()),
                mean_version=float(versions.mean()),
                num_tokens=group.num_tokens,
                num_bytes=12 * group.num_tokens,
            )
        )
        self.counts.evicted += sum(self._groups.pop(e.lease_id).num_tokens for e in evicted)
        self._arrived.set()

    async def take(self, count: int, *, policy_version: int) -> list[Group]:
        """The next `count` groups, none older than the staleness bound."""
        while True:
            for stale in self._order.drop_older_than(policy_version - self._max_staleness):
                self.counts.stale += self._groups.pop(stale.lease_id).num_tokens
            if len(self._order) >= count:
                return [self._groups.pop(each.lease_id) for each in self._order.take(count)]
            self._arrived.clear()
            await self._arrived.wait()


async def act(
    config: Config,
    rollout: Rollout,
    curriculum: UniformCurriculum,
    task: Task,
    buffer: Buffer,
    lease_ids: "itertools.count[int]",
) -> None:
    """One of many actor tasks: screens prompts and continues those that pass the gate."""
    counts = buffer.counts
    while True:
        [prompt_id] = curriculum.choose(1)
        lease = Lease(lease_id=next(lease_ids), prompt_id=prompt_id, kind=LeaseKind.TRAINING)
        work = LeaseProgress(lease=lease)
        try:
            result = await rollout.run(work, task.train_prompts[prompt_id])
        except Aborted:  # the group became too old while it was generated
            counts.stale += work.num_tokens
            continue
        screening = work.completions[: config.gate.num_screening]
        counts.pass_rates.append(sum(each.passed for each in screening) / len(screening))
        if isinstance(result, Group):
            buffer.put(result)
        else:
            counts.screened_out += work.num_tokens


async def learn(
    config: Config, trainer: Trainer, sender: MemorySender, engine: SteppedEngine, buffer: Buffer
) -> None:
    """Takes batches, updates the policy, and publishes each version to the engine."""
    counts = buffer.counts
    for version in range(1, config.run.updates + 1):
        groups = await buffer.take(config.learner.groups_per_update, policy_version=version - 1)
        await asyncio.to_thread(trainer.update, groups)
        counts.trained += sum(group.num_tokens for group in groups)
        offer = WeightOffer(
            policy_version=version,
            epoch=1,
            rank=0,  # of the sender; the engine is rank 1
            world_size=2,
            store_host="",
            store_port=0,
            backend="gloo",
            deadline_s=60.0,
        )
        weights = trainer.whole([name for name, _ in trainer.weights()])
        sending = asyncio.to_thread(sender.send, offer, weights.items(), trainer.canary())
        await asyncio.gather(sending, engine.update_weights(replace(offer, rank=1)))
        print(f"update {version:3d}  pass rate {np.mean(counts.pass_rates):.2f}", flush=True)
        counts.pass_rates.clear()


async def train(config: Config) -> Counts:
    """Runs actor tasks and the learner until the last update."""
    task, folder = make_task(config.task), Path(config.model.path)
    store, counts = MemoryStore(), Counts()
    trainer = Trainer(config=config, model=load_model(config.model.path, device="cpu"))
    sender = MemorySender(store, bucket_bytes=config.weights.bucket_bytes)

    def make_generator() -> TorchGenerator:
        loaded = load_model_folder(folder, context_length=None, device="cpu")
        return TorchGenerator(
            loaded.model,
            num_slots=config.actors.num_slots,
            context_length=loaded.context_length,
            eos_token_ids=loaded.eos_token_ids,
            random=torch.Generator().manual_seed(config.run.seed),
            receiver=MemoryReceiver(store),
            canary_tolerance=config.weights.canary_tolerance,
        )

    buffer = Buffer(config, counts)
    order = UniformState(rng=np.random.default_rng(config.run.seed))
    curriculum = UniformCurriculum(len(task.train_prompts), order)
    codec, lease_ids = PromptCodec(load_tokenizer(folder), chat_template=False), itertools.count()
    async with SteppedEngine(ThreadWorker(make_generator)) as engine:
        rollout = Rollout(config, engine, ScriptedVerifier(task.score), codec)
        actors = [
            asyncio.create_task(act(config, rollout, curriculum, task, buffer, lease_ids))
            for _ in range(PROMPTS_IN_FLIGHT)
        ]
        learner = asyncio.create_task(learn(config, trainer, sender, engine, buffer))
        await asyncio.wait([learner, *actors], return_when=asyncio.FIRST_COMPLETED)
        for each in actors:
            each.cancel()
        await asyncio.gather(learner, *actors, return_exceptions=True)
        learner.result()
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the quickstart's model in one process.")
    parser.add_argument("--updates", default="20")
    overrides = ["--run.updates", parser.parse_args().updates]
    print(f"generated tokens: {asyncio.run(train(load_config(CONFIG, overrides)))}")
