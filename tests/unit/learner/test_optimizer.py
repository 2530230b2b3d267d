"""AdamW and the schedules of its learning rate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from speed_async.config.checks.combinations import check_combinations
from speed_async.config.sections.learner import LearnerConfig
from speed_async.learner.optimizer import learning_rate, make_optimizer
from tests.fakes.learner_samples import make_config, save_tiny_llama


def rates(total: int, **learner: object) -> list[float]:
    config = LearnerConfig(lr=2.0, **learner)  # pyright: ignore[reportArgumentType]
    return [learning_rate(config, update, total_updates=total) for update in range(total)]


def test_schedules_decrease_from_the_end_of_the_warm_up() -> None:
    settings = {"warmup_updates": 2, "min_lr_share": 0.1}
    assert rates(6, lr_schedule="linear", **settings) == pytest.approx(
        [1.0, 2.0, 2.0, 1.55, 1.1, 0.65]
    )
    # (1 + cos(pi / 4)) / 2 = 0.853553 and 1 - 0.853553
    assert rates(6, lr_schedule="cosine", **settings) == pytest.approx(
        [1.0, 2.0, 2.0, 0.2 + 1.8 * 0.853553, 1.1, 0.2 + 1.8 * 0.146447], abs=1e-5
    )
    assert rates(4, warmup_updates=2) == [1.0, 2.0, 2.0, 2.0]
    assert rates(2, warmup_updates=0, lr_schedule="linear") == [2.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_equal_those_of_transformers_after_the_warm_up(schedule: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    steps = {"num_warmup_steps": 5, "num_training_steps": 23}
    theirs = (
        get_linear_schedule_with_warmup(optimizer, **steps)
        if schedule == "linear"
        else get_cosine_with_min_lr_schedule_with_warmup(optimizer, **steps, min_lr_rate=0.0)
    )
    expected = []
    for _ in range(23):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = rates(23, warmup_updates=5, lr_schedule=schedule)
    assert ours[5:] == pytest.approx(expected[5:])


def test_a_longer_run_than_planned_keeps_the_minimum() -> None:
    config = LearnerConfig(lr=2.0, lr_schedule="cosine", min_lr_share=0.25, warmup_updates=0)
    assert learning_rate(config, 12, total_updates=8) == pytest.approx(0.5)


def test_the_optimiser_has_the_configured_moments() -> None:
    config = LearnerConfig(adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-5)
    optimizer = make_optimizer(torch.nn.Linear(2, 2), config)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.95), 1e-5)


def test_contradictory_schedules_are_errors(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)

    def errors(**learner: Any) -> list[str]:
        return [error.field for error in check_combinations(make_config(folder, **learner))]

    assert errors(lr_schedule="cosine", warmup_updates=100) == ["learner.lr_schedule"]
    assert errors(lr_schedule="cosine", warmup_updates=99, min_lr_share=0.1) == []
