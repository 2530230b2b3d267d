"""Shapes of groups that leave nothing to train on are refused."""

import itertools

import numpy as np
import pytest

from speed_async.algorithms.screening import kept
from speed_async.config.checks.gate import check_gate
from speed_async.config.schema import Config
from speed_async.config.sections.gate import GateConfig


def unbiased(gate: GateConfig) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "task": {"name": "arithmetic"},
            "gate": gate.model_dump(),
            "objective": {"screening_samples": "unbiased"},
        }
    )


@pytest.mark.parametrize("mode", ["filter", "screen"])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (4, 4)])
@pytest.mark.parametrize("band", [(0.0, 1.0), (0.25, 0.75), (0.4, 0.6), (0.0, 0.4), (0.6, 1.0)])
def test_unbiased_is_refused_if_no_outcome_of_an_admitted_group_keeps_a_sample(
    mode: str, size: tuple[int, int], band: tuple[float, float]
) -> None:
    gate = GateConfig.model_validate(
        {"mode": mode, "n_init": size[0], "n_cont": size[1], "low": band[0], "high": band[1]}
    )
    num_kept = [
        int(kept(np.array(outcome), gate.num_screening, gate, "unbiased").sum())
        for outcome in itertools.product([False, True], repeat=gate.group_size)
        if gate.admits(sum(outcome[: gate.num_screening]), gate.num_screening)
    ]
    if not num_kept:
        return  # refused for another reason: no prompt can pass
    fields = [error.field for error in check_gate(unbiased(gate))]
    assert fields == ([] if any(num_kept) else ["objective.screening_samples"])
