"""Simulated actors and learners that use the real protocol with synthetic groups."""

import os
from collections import deque
from dataclasses import asdict
from functools import cache

import numpy as np

from benchmarks.harness import QUICKSTART
from benchmarks.service_peers import PackedGroup, Peer, ReceivedGroup
from speed_async.config.schema import TaskConfig
from speed_async.environments.registry import make_task
from speed_async.environments.task import fingerprint
from speed_async.launcher.identity.model_files import model_fingerprint
from speed_async.transport import messages as m
from speed_async.types import ActorCounts

GROUP_SIZE = 24
GROUPS_A_BATCH = 16
BATCHES_A_CHECKPOINT = 20
"""The learner reports a durable checkpoint this often. Until then the journal keeps its groups."""
PROMPT_TOKENS = 128
VOCABULARY = 8
"""Token ids that exist in any model."""
TASK: dict[str, object] = {"name": "arithmetic", "num_prompts": 4096, "num_held_out": 1}


class SimulatedActor:
    """Answers each lease with the same synthetic group, with at most `window` groups
    unacknowledged."""

    def __init__(self, peer: Peer, index: int, group: PackedGroup, window: int) -> None:
        self.peer = peer
        self.num_leases = 0
        self.num_sent = 0
        self._group = group
        self._window = window
        self._waiting: deque[tuple[int, int]] = deque()
        self._requested = 0
        self._tokens_sent = 0
        peer.send(hello("actor", index))
        self.request_prompts()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def may_send(self) -> bool:
        return self.has_work and len(self.peer.unacknowledged) < self._window

    def request_prompts(self) -> None:
        """Request prompts up to one window, including the waiting ones."""
        num_prompts = self._window - len(self._waiting)
        if num_prompts - self._requested >= max(1, self._window // 2):
            self._requested = num_prompts
            self.peer.send(m.WantWork(num_prompts=num_prompts, counts=self._counts()))

    def take(self, message: m.Message) -> None:
        if not isinstance(message, m.Leases):
            return
        self.num_leases += len(message.lease_ids)
        if message.kind == "evaluation":
            for _ in message.lease_ids:
                self.num_sent += 1
            self._tokens_sent += len(message.lease_ids)
            for lease_id in message.lease_ids:
                self.peer.send(evaluated(lease_id, self._counts()))
        else:
            self._waiting.extend(zip(message.lease_ids, message.prompt_ids, strict=True))
        self._requested -= len(message.lease_ids)
        self.request_prompts()

    def send_one(self, due_s: float | None = None) -> None:
        lease_id, prompt_id = self._waiting.popleft()
        self.num_sent += 1
        self._tokens_sent += self._group.num_tokens
        counts = asdict(self._counts())
        values = {"lease_id": lease_id, "prompt_id": prompt_id, "counts": counts}
        self.peer.send_group(self._group, values, due_s)
        self.request_prompts()

    def report(self) -> None:
        """Send the heartbeat."""
        gauges = {"slots_busy": 1.0, "num_slots": 1.0, "loop_lag_s": 0.0}
        self.peer.send(m.ActorReport(gauges=gauges, counts=self._counts()))

    def _counts(self) -> ActorCounts:
        return ActorCounts(
            groups_leased=self.num_leases,
            groups_in_flight=self.num_leases - self.num_sent,
            completions_generated=GROUP_SIZE * self.num_sent,
            tokens_generated=self._tokens_sent,
        )


class SimulatedLearner:
    """Takes batches and reports them as trained."""

    def __init__(self, peer: Peer, *, journals: bool) -> None:
        self.peer = peer
        self.version = 0
        self.num_groups = 0
        self.num_tokens = 0
        self._journals = journals
        peer.send(hello("learner", 0))
        self._take()

    def receive(self, timeout_s: float) -> None:
        message = self.peer.receive(timeout_s)
        if isinstance(message, ReceivedGroup):
            self.num_groups += 1
            self.num_tokens += message.num_tokens
        elif isinstance(message, m.BatchReady):
            self._train(message)

    def _take(self) -> None:
        self.peer.send(m.TakeBatch(policy_version=self.version, num_groups=GROUPS_A_BATCH))

    def _train(self, ready: m.BatchReady) -> None:
        self.version += 1
        trained = m.Trained(
            policy_version=self.version,
            lease_ids=ready.lease_ids,
            skipped=False,
            groups_trained=self.num_groups,
            completions_trained=GROUP_SIZE * self.num_groups,
            tokens_trained=self.num_tokens,
            metrics={"loss": 0.0, "grad_norm": 0.0},
        )
        self.peer.send(trained)
        if self._journals and self.version % BATCHES_A_CHECKPOINT == 0:
            self.peer.send(
                m.CheckpointSaved(policy_version=self.version, oldest_kept_version=self.version)
            )
        self._take()


def hello(role: str, index: int) -> m.Hello:
    return m.Hello(
        role=role,
        index=index,
        incarnation=0,
        fingerprint=task_fingerprint(),
        model_fingerprint=quickstart_fingerprint(),
        process_id=os.getpid(),
    )


@cache
def quickstart_fingerprint() -> str:
    return model_fingerprint(QUICKSTART.parent / "model", chat_template=False)


@cache
def task_fingerprint() -> str:
    return fingerprint(make_task(TaskConfig.model_validate(TASK)))


def evaluated(lease_id: int, counts: ActorCounts) -> m.Evaluated:
    return m.Evaluated(
        lease_id=lease_id,
        num_passed=1,
        num_completions=1,
        num_truncated=0,
        num_tokens=1,
        oldest_version=0,
        newest_version=0,
        counts=counts,
    )


def make_group(tokens_each: int, group_size: int = GROUP_SIZE) -> PackedGroup:
    """A group whose first half passed."""
    total = tokens_each * group_size
    rng = np.random.default_rng(0)
    group = m.GroupFinished(
        counts=ActorCounts(),
        lease_id=0,
        prompt_id=0,
        num_screening=0,
        prompt_token_ids=rng.integers(0, VOCABULARY, PROMPT_TOKENS).astype(np.int32),
        lengths=np.full(group_size, tokens_each, np.int32),
        rewards=(np.arange(group_size) < group_size // 2).astype(np.float32),
        cut=np.zeros(group_size, np.int32),
        token_ids=rng.integers(0, VOCABULARY, total).astype(np.int32),
        logprobs=-rng.random(total).astype(np.float32),
        policy_versions=np.zeros(total, np.int32),
    )
    return PackedGroup(group)
