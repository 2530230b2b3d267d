"""Small runs of the service benchmarks with real groups and processes."""

import pytest

from benchmarks.service import Arm, run_arm
from benchmarks.soak import growth


@pytest.mark.parametrize("kind", ["bare", "batched"])
def test_benchmark_arm_moves_groups_end_to_end(kind: str) -> None:
    measured = run_arm(Arm(tokens_each=16, kind=kind, curve=False), None, 0.2)
    assert measured.groups_per_s > 0
    assert measured.cpu_us is not None and measured.cpu_us > 0


def test_growth_compares_the_last_tenth_with_the_first() -> None:
    assert growth([100.0] * 10 + [150.0] * 80 + [101.0] * 10) == pytest.approx(0.01)
    assert growth([100.0]) == 0.0
