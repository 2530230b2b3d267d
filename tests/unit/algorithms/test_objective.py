from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from speed_async.algorithms.objective import compute_signals, make_objective
from speed_async.algorithms.screening import Choice, kept
from speed_async.config.sections.gate import GateConfig
from speed_async.config.sections.objective import ObjectiveConfig
from speed_async.types import Group
from tests.fakes.learner_samples import make_completion, make_config, make_group, make_loss_tokens


def kept_of(passed: list[int], choice: Choice, *, num_screening: int = 4, **gate: Any) -> list[int]:
    return (
        kept(np.array(passed, dtype=np.bool_), num_screening, GateConfig(**gate), choice)
        .astype(int)
        .tolist()
    )


def test_all_and_none_keep_all_or_no_screening_samples():
    assert kept_of([1, 0, 0, 0, 1, 0], "all") == [1, 1, 1, 1, 1, 1]
    assert kept_of([1, 0, 0, 0, 1, 0], "none") == [0, 0, 0, 0, 1, 1]


def test_the_only_pass_or_failure_is_pivotal_at_the_default_gate():
    assert kept_of([1, 0, 0, 0, 1, 0], "unbiased") == [0, 1, 1, 1, 1, 1]
    assert kept_of([1, 1, 0, 1, 1, 0], "unbiased") == [1, 1, 0, 1, 1, 1]
    assert kept_of([1, 1, 0, 0, 1, 0], "unbiased") == [1, 1, 1, 1, 1, 1]


def test_with_two_screening_samples_both_are_pivotal():
    assert kept_of([1, 0, 1], "unbiased", num_screening=2) == [0, 0, 1]


def test_pivotal_samples_depend_on_the_thresholds():
    # open at 2 of 4 only: any flip closes the gate
    assert kept_of([1, 1, 0, 0, 0], "unbiased", low=0.25, high=0.75) == [0, 0, 0, 0, 1]
    # open at 2, 3 and 4 of 4: passes are pivotal at 2, nothing is at 3 or 4
    assert kept_of([1, 1, 0, 0], "unbiased", low=0.3, high=1.0) == [0, 0, 1, 1]
    # open at 2 and 3: at 3 the failure is pivotal (4 is not below 1)
    assert kept_of([1, 1, 1, 0], "unbiased", low=0.3, high=1.0) == [1, 1, 1, 0]


def test_all_samples_of_an_unscreened_group_are_kept():
    for choice in ("all", "unbiased", "none"):
        assert kept_of([1, 0, 0], choice, num_screening=0) == [1, 1, 1]


def example(num_screening: int = 0) -> Group:
    return make_group(
        [1],
        make_completion([2] * 4, 1.0),
        make_completion([2] * 8, 0.0),
        make_completion([2] * 10, 1.0),
        num_screening=num_screening,
    )


def objective_of(folder: Path, **chosen: Any):
    return make_objective(
        make_config(folder, max_new_tokens=10, objective=ObjectiveConfig(**chosen))
    )


def test_advantages_use_shaped_rewards(tmp_path: Path):
    objective = objective_of(
        tmp_path, advantage="dr_grpo", overlong_share=0.4, overlong_penalty=0.5,
        aggregation="sequence_mean",
    )  # fmt: skip

    (signal,) = compute_signals(objective, [example()])

    # rewards 1, 0 - 0.5 * 2/4, 1 - 0.5: mean 1.25 / 3
    mean = 1.25 / 3
    assert signal.advantages_N.tolist() == pytest.approx([1 - mean, -0.25 - mean, 0.5 - mean])
    assert signal.weights_N.tolist() == pytest.approx([1 / 12, 1 / 24, 1 / 30])
    assert signal.kept_N.all()


def test_the_overlong_penalty_is_relative_to_the_context_limit(tmp_path: Path):
    """The context of 16 tokens, 6 or 8 of them the prompt, is far below actors.max_new_tokens."""
    config = make_config(
        tmp_path,
        max_new_tokens=1000,
        objective=ObjectiveConfig(advantage="dr_grpo", overlong_share=0.5, overlong_penalty=1.0),
    )
    completions = [make_completion([2] * length, 1.0) for length in (4, 7, 8)]
    groups = [make_group([1] * length, *completions) for length in (6, 8)]

    first, second = compute_signals(make_objective(config, context_length=16), groups)

    shaped = np.array([1, 1 - 2 / 5, 1 - 3 / 5])  # limit 10, penalty over the last 5
    assert first.advantages_N.tolist() == pytest.approx((shaped - shaped.mean()).tolist())
    shaped = np.array([1, 1 - 3 / 4, 0])  # limit 8, penalty over the last 4
    assert second.advantages_N.tolist() == pytest.approx((shaped - shaped.mean()).tolist())
    unlimited, _ = compute_signals(make_objective(config), groups)  # no context limit: no penalty
    assert unlimited.advantages_N.tolist() == [0, 0, 0]


def test_the_mask_uses_raw_rewards_and_the_baseline_all_completions(tmp_path: Path):
    # the shaped reward of the long completion is 0, but its raw reward passes the gate
    shaped = {"overlong_share": 0.4, "screening_samples": "unbiased", "advantage": "dr_grpo"}

    (signal,) = compute_signals(objective_of(tmp_path, **shaped), [example(num_screening=3)])

    assert signal.kept_N.tolist() == [True, False, True]  # 2 of 3 pass: the failure is pivotal
    assert signal.advantages_N.tolist() == pytest.approx([5 / 6, -4 / 6, -1 / 6])


def test_denominators_include_dropped_completions(tmp_path: Path):
    flat = make_group([1], make_completion([2] * 3, 0.0), make_completion([], 0.0))
    objective = objective_of(tmp_path, screening_samples="none", aggregation="token_mean")

    first, second = compute_signals(objective, [example(num_screening=2), flat])

    assert first.kept_N.tolist() == [False, False, True]
    assert first.weights_N.tolist() == [1 / 25] * 3
    assert second.weights_N.tolist() == [1 / 25] * 2
    assert second.advantages_N.tolist() == [0.0, 0.0]


def test_every_configured_name_maps_to_its_strategy(tmp_path: Path):
    tokens = make_loss_tokens([0.4, 0.1], [0.1, 0.1], [1.0, 1.0])  # ratios 4 and 1
    factors = {}
    for correction in get_args(ObjectiveConfig.model_fields["correction"].annotation):
        objective = objective_of(
            tmp_path,
            correction=correction,
            min_ratio=0.5,
            max_ratio=3.0,
            max_negative_kl=0.1,
            max_probability_change=0.2,
        )
        factors[correction] = objective.correction(tokens).weights_N.tolist()
    assert factors == {
        "none": [1.0, 1.0],
        "token_tis": pytest.approx([3.0, 1.0]),
        "sequence_tis": pytest.approx([3.0, 1.0]),
        "sequence_snis": pytest.approx([3.0, 1.0]),  # the trainer divides by their mean
        "geometric_tis": pytest.approx([3.0, 1.0]),
        "token_mask": pytest.approx([0.0, 1.0]),
        "sequence_mask": pytest.approx([0.0, 1.0]),
        "geometric_mask": pytest.approx([0.0, 1.0]),
        "probability_mask": pytest.approx([0.0, 1.0]),
        "negative_sequence_mask": [1.0, 1.0],
    }

    clipped = {}
    for name in ("policy_gradient", "ppo_clip", "cispo", "gspo"):
        objective = objective_of(
            tmp_path, policy_loss=name, correction="none", clip_low=0.1, clip_high=4.0
        )
        losses = objective.policy_loss(tokens, objective.correction(tokens))
        clipped[name] = losses.clipped_N.tolist()
        tight = objective_of(tmp_path, policy_loss=name, correction="none", clip_high=0.5)
        losses = tight.policy_loss(tokens, tight.correction(tokens))
        clipped[name] += losses.clipped_N.tolist()
    assert clipped == {
        "policy_gradient": [False] * 4,
        "ppo_clip": [False, False, True, False],
        "cispo": [False, False, True, False],
        "gspo": [False, False, True, False],
    }


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("rloo", [0.5, -1.0, 0.5]),
        ("grpo", [(1 / 3) / ((1 / 3) ** 0.5 + 1e-4), -(2 / 3) / ((1 / 3) ** 0.5 + 1e-4)]),
        ("dr_grpo", [1 / 3, -2 / 3]),
        ("batch", [(1 / 3) / ((1 / 3) ** 0.5 + 1e-4)]),
    ],
)
def test_advantages_by_name(tmp_path: Path, advantage: str, expected: list[float]):
    (signal,) = compute_signals(objective_of(tmp_path, advantage=advantage), [example()])
    assert signal.advantages_N.tolist()[: len(expected)] == pytest.approx(expected)


def test_the_shrunken_advantage_uses_the_prior_weight(tmp_path: Path):
    # Rewards 1 0 1 beside 1 0 1: c = 2/3, so b = (4 x 2/3 + passes among the other two) / 6.
    objective = objective_of(tmp_path, advantage="shrunken", prior_weight=4.0)
    for signal in compute_signals(objective, [example(), example()]):
        assert signal.advantages_N.tolist() == pytest.approx([7 / 18, -7 / 9, 7 / 18])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 22, 1 / 22, 1 / 22]),
        ("sequence_mean", [1 / 12, 1 / 24, 1 / 30]),
        ("prompt_mean", [1 / 22, 1 / 22, 1 / 22]),
        ("fixed_length", [1 / 30, 1 / 30, 1 / 30]),
    ],
)
def test_aggregations_by_name(tmp_path: Path, aggregation: str, expected: list[float]):
    (signal,) = compute_signals(objective_of(tmp_path, aggregation=aggregation), [example()])
    assert signal.weights_N.tolist() == pytest.approx(expected)
