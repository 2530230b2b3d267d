"""All kinds of faults at random times in one run; test_recovery.py injects them one by one.

The long drill is `python -m tests.faults.chaos --faults 500`.
"""

from pathlib import Path

import pytest

from tests.faults.drill import run_drills
from tests.faults.faults import KINDS, plan
from tests.faults.results import GROWTH, service_growth
from tests.faults.settings import GROUPS_PER_UPDATE, Plan

SEED = 1640
NUM_FAULTS = 20


@pytest.mark.slow
def test_twenty_faults_lose_no_group_train_none_twice_and_the_run_finishes(
    tmp_path: Path,
) -> None:
    print(f"seed {SEED}")
    faults = plan(SEED, NUM_FAULTS, KINDS, overlapping=0.5)
    [result] = run_drills(tmp_path, Plan(faults=faults, seed=SEED), NUM_FAULTS)
    assert len(result.rounds) + len(result.skipped) == NUM_FAULTS
    assert len(result.skipped) <= 2, result.skipped
    numbers = result.verdict.numbers
    assert numbers["groups_trained"] == numbers["updates"] * GROUPS_PER_UPDATE
    assert service_growth(result.rounds) < GROWTH
