"""Which run is made next: tuning first, then evaluation in shuffled blocks of one seed each."""

import random
from collections.abc import Sequence

from benchmarks.evidence.plan import (
    ARMS,
    COMPARISONS,
    DECIDING_SEEDS,
    EXPERIMENT,
    OTHER_SEEDS,
    Setting,
)
from benchmarks.evidence.records import Job, Record
from benchmarks.evidence.tuning import Tuning, chosen_setting, resolve


def pending_jobs(
    spread: str, arms: Sequence[str], records: Sequence[Record], *, idle: bool = False
) -> list[Job]:
    """The runs that can be made now, in order; empty when all are made.

    While some of `arms` lack a tuning, these are tuning runs, in one shuffled order. Then they are
    evaluation runs: one block per seed, the arms of a block shuffled. An arm that is tuned as
    another one runs only if it decides. With `idle`, an evaluation run counts as made only if the
    machine was idle.
    """
    tuning = [
        _job(spread, arm, setting, seed)
        for arm in arms
        if not ARMS[arm].tuned_as
        for setting, seed in Tuning(spread, arm, records).pending
    ]
    if tuning:
        return sorted(tuning, key=lambda job: random.Random(repr(job.key)).random())
    deciding = deciding_arms(spread, records)
    done = {record.key for record in records if record.is_idle or not idle}
    jobs = []
    for seed in DECIDING_SEEDS:
        due = [
            arm
            for arm in arms
            if arm in deciding or (seed in OTHER_SEEDS and not ARMS[arm].tuned_as)
        ]
        for arm in random.Random(seed).sample(due, len(due)):
            setting = chosen_setting(spread, arm, records)
            if setting is not None and (job := _job(spread, arm, setting, seed)).key not in done:
                jobs.append(job)
    return jobs


def _job(spread: str, arm: str, setting: Setting, seed: int) -> Job:
    return Job(experiment=EXPERIMENT, spread=spread, arm=arm, setting=setting, seed=seed)


def deciding_arms(spread: str, records: Sequence[Record]) -> set[str]:
    """Arms of the comparisons that are resolved so far."""
    names = (
        name
        for comparison in COMPARISONS
        if comparison.spread == spread
        for name in (comparison.arm, comparison.base)
    )
    return {arm for name in names if (arm := resolve(spread, name, records)) is not None}
