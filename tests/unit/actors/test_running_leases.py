"""The counts of an actor's leases, and the number of prompts that it requests."""

import numpy as np

from speed_async.actors.engine import EngineStats
from speed_async.actors.rollout import LeaseProgress
from speed_async.actors.running_leases import RunningLeases
from speed_async.config.sections.gate import GateConfig
from speed_async.types import ActorCounts, Lease, LeaseKind, Sampled


def work(lease_id: int, *, num_waiting: int = 0) -> LeaseProgress:
    lease = Lease(lease_id=lease_id, prompt_id=0, kind=LeaseKind.TRAINING)
    return LeaseProgress(lease=lease, num_waiting=num_waiting)


def test_two_requests_per_slot_are_the_target() -> None:
    leases = RunningLeases(GateConfig(n_init=4, n_cont=20), num_slots=32)
    assert leases.next_request() == 16  # 64 requests, 4 for each prompt
    assert leases.next_request() is None  # nothing has changed
    for lease_id in range(16):
        leases.add(work(lease_id, num_waiting=4))
    assert leases.next_request() is None  # all were granted, and the engine's queue is full
    for each in leases:
        each.num_waiting = 2
    assert leases.next_request() == 8


def test_counts_include_running_leases_and_keep_ended_ones() -> None:
    leases = RunningLeases(GateConfig(), num_slots=4)
    first, second = work(1), work(2)
    for each in (first, second):
        leases.add(each)
        each.add(
            Sampled(
                token_ids=np.zeros(3, np.int32),
                logprobs=np.zeros(3, np.float32),
                policy_versions=np.zeros(3, np.int32),
                finish_reason="stop",
            )
        )
    second.continuing = True
    leases.remove(first)
    stats = EngineStats(
        tokens_generated=11,
        tokens_running=5,
        num_running=1,
        num_waiting=0,
        num_slots=4,
        policy_version=0,
        steps=1,
    )
    assert leases.counts(stats) == ActorCounts(
        groups_leased=2,
        groups_in_flight=1,
        groups_continuing=1,
        completions_generated=1,
        tokens_generated=11,
        tokens_in_flight=8,
    )
