"""The gate's thresholds and the evaluation plan."""

import pytest

from speed_async.buffer.evaluations import EvaluationPlan, EvaluationState
from speed_async.config.sections.gate import GateConfig


def is_admitted(passed: list[int], low: float = 0.0, high: float = 1.0) -> bool:
    return GateConfig(low=low, high=high).admits(sum(passed), len(passed))


@pytest.mark.parametrize(
    ("passed", "admitted"),
    [([0, 0, 0, 0], False), ([1, 0, 0, 0], True), ([1, 1, 1, 0], True), ([1, 1, 1, 1], False)],
)
def test_default_band_admits_all_mixed_outcomes(passed: list[int], admitted: bool) -> None:
    assert is_admitted(passed) is admitted


def test_thresholds_are_exclusive() -> None:
    assert not is_admitted([1, 0, 0, 0], 0.25, 0.75)
    assert is_admitted([1, 1, 0, 0], 0.25, 0.75)
    assert not is_admitted([1, 1, 1, 0], 0.25, 0.75)


def test_evaluation_finishes_with_its_last_prompt_and_aggregates_results() -> None:
    plan = EvaluationPlan("s", every=5, num_samples=4, num_prompts=2, state=EvaluationState())
    assert plan.due(10)
    assert not plan.due(11)
    plan.start(10)
    assert not plan.due(15)
    prompts = [plan.next_prompt(), plan.next_prompt()]
    assert plan.next_prompt() is None
    plan.give_back(1)
    assert plan.next_prompt() == 1
    assert sorted(p for p in prompts if p is not None) == [0, 1]
    assert plan.record(3, 4, 10, 10) is None
    result = plan.record(0, 4, 10, 11)
    assert result is not None
    assert (result.accuracy, result.policy_version) == (3 / 8, 10)
    assert (result.oldest_version, result.newest_version) == (10, 11)
    assert plan.target_version is None


def test_completions_without_a_verdict_count_apart_in_an_evaluation() -> None:
    plan = EvaluationPlan("s", every=10, num_samples=4, num_prompts=2, state=EvaluationState())
    plan.start(1)
    plan.record(3, 3, 1, 1, num_unscored=1)
    result = plan.record(0, 0, None, None, num_unscored=4)
    assert result is not None
    assert (result.accuracy, result.num_completions, result.num_unscored) == (1.0, 3, 5)
