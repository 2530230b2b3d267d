"""Both curricula: their choices, what they learn, and the service's calls."""

from collections import Counter
from math import ceil
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from speed_async.buffer.curriculum.curriculum import (
    UniformCurriculum,
    UniformState,
    make_curriculum,
    new_curriculum_state,
)
from speed_async.buffer.curriculum.posterior import PosteriorCurriculum
from speed_async.buffer.service import BufferService
from speed_async.config.sections.gate import GateConfig
from speed_async.transport import messages as m
from speed_async.transport.groups import validate_group
from speed_async.types import ActorCounts
from tests.fakes.buffer_fixtures import make_config, make_group, posterior, screened

GATE = GateConfig()


# --- uniform -------------------------------------------------------------------------------


def test_uniform_visits_every_prompt_once_an_epoch_and_returned_ones_first() -> None:
    curriculum = UniformCurriculum(5, UniformState(rng=np.random.default_rng(0)))
    first = curriculum.choose(3)
    curriculum.give_back(first[1])
    assert curriculum.choose(1) == [first[1]]
    assert sorted(first + curriculum.choose(2)) == [0, 1, 2, 3, 4]
    assert sorted(curriculum.choose(5)) == [0, 1, 2, 3, 4]


def test_a_uniform_choice_across_two_epochs_has_no_duplicates() -> None:
    curriculum = UniformCurriculum(5, UniformState(rng=np.random.default_rng(0)))
    chosen = [curriculum.choose(4) for _ in range(20)]
    assert all(len(set(prompts)) == 4 for prompts in chosen)
    # 80 choices are 16 epochs: a prompt deferred in one epoch is not lost in the next.
    counts = Counter(prompt for prompts in chosen for prompt in prompts)
    assert set(counts.values()) == {16}


def test_a_uniform_choice_larger_than_the_data_set_contains_every_prompt() -> None:
    curriculum = UniformCurriculum(3, UniformState(rng=np.random.default_rng(0)))
    chosen = curriculum.choose(7)
    assert len(chosen) == 7
    assert set(chosen[:3]) == {0, 1, 2}


# --- choice -------------------------------------------------------------------------------


def test_only_outcome_independent_choices_enter_the_prior() -> None:
    curriculum = posterior(1, uniform_share=1e-9)
    start = curriculum.beliefs.prior.sums.copy()
    [cold] = curriculum.choose(1)
    curriculum.record(cold, 4, 4)
    after_cold = curriculum.beliefs.prior.sums.copy()
    assert after_cold - start == pytest.approx([1, 1, 1])
    # Now the prompt is chosen because of its outcomes.
    [again] = curriculum.choose(1)
    curriculum.record(again, 0, 4)
    assert curriculum.beliefs.prior.sums == pytest.approx(after_cold)
    # Uniform sampling does not depend on them.
    walking = posterior(1, uniform_share=1.0)
    for _ in range(3):
        walking.record(walking.choose(1)[0], 4, 4)
    assert walking.beliefs.prior.sums - start == pytest.approx([3, 3, 3])


def test_without_data_every_prompt_is_equally_likely() -> None:
    counts = np.zeros(50)
    for seed in range(2_000):
        counts[posterior(50, seed=seed).choose(5)] += 1
    # 10,000 choices, 200 expected each; chi-square with 49 degrees of freedom, 99.9 % quantile 85.
    assert ((counts - 200) ** 2 / 200).sum() < 85


def test_thompson_prefers_moderate_prompts() -> None:
    rng = np.random.default_rng(1)
    curriculum = posterior(300)
    theta = np.repeat([0.0, 0.5, 1.0], 100)
    late: Counter[float] = Counter()
    for step in range(600):
        for prompt in curriculum.choose(4):
            late[float(theta[prompt])] += step >= 300
            curriculum.record(prompt, *screened(theta[prompt], rng))
    # A third of the uniform tenth, and nearly all of the rest.
    assert late[0.5] / late.total() > 0.85


def test_no_prompt_is_leased_twice_at_once_or_chosen_twice_in_one_call() -> None:
    curriculum = posterior(200, uniform_share=0.3)
    rng = np.random.default_rng(2)
    leased: list[int] = []
    for _ in range(300):
        chosen = curriculum.choose(int(rng.integers(0, 30)))
        assert not set(chosen) & set(leased)
        assert len(set(chosen)) == len(chosen)
        leased += chosen
        rng.shuffle(leased)
        for prompt in leased[60:]:
            curriculum.record(prompt, 2, 24)
        leased = leased[:60]


@pytest.mark.parametrize("each", [1, 7, 64])
def test_no_prompt_starves_and_the_uniform_share_is_kept(each: int) -> None:
    num_prompts, share = 512, 0.25
    curriculum = posterior(num_prompts, uniform_share=share)
    theta = np.where(np.arange(num_prompts) < 64, 0.5, 0.0)
    rng = np.random.default_rng(3)
    seen: set[int] = set()
    # One more choice, for the remaining fraction of the uniform share.
    for _ in range(ceil(num_prompts / (share * each)) + 1):
        for prompt in curriculum.choose(each):
            seen.add(prompt)
            curriculum.record(prompt, *screened(theta[prompt], rng))
    assert len(seen) == num_prompts


@pytest.mark.parametrize("num_prompts", [101, 60])  # of 60, most strides are no full cycle
def test_uniform_sampling_visits_every_prompt_once_an_epoch_in_new_order(num_prompts: int) -> None:
    curriculum = posterior(num_prompts, uniform_share=1.0)
    epochs = []
    for _ in range(8):
        epoch = [curriculum.choose(1)[0] for _ in range(num_prompts)]
        for prompt in epoch:
            curriculum.record(prompt, 0, 4)
        assert sorted(epoch) == list(range(num_prompts))
        epochs.append(tuple(epoch))
    assert len(set(epochs)) == 8


def test_a_returned_prompt_comes_first_and_is_not_leased_meanwhile() -> None:
    curriculum = posterior(10)
    first = curriculum.choose(4)
    curriculum.give_back(first[2])
    assert curriculum.choose(1) == [first[2]]
    curriculum.give_back(first[0])
    everything = curriculum.choose(7)
    assert everything[0] == first[0]
    assert sorted(everything[1:] + first) == list(range(10))


def test_surplus_leases_are_granted_after_every_free_prompt() -> None:
    curriculum = posterior(5)
    first = curriculum.choose(2)
    second = curriculum.choose(4)
    assert len(set(second)) == 4
    assert set(second[:3]) == set(range(5)) - set(first)
    assert len(curriculum.choose(12)) == 12
    for prompt in [*range(5), *range(5)]:
        curriculum.record(prompt, 1, 4)
    assert sorted(curriculum.choose(5)) == [0, 1, 2, 3, 4]


def test_a_lease_without_completions_ends_without_an_outcome() -> None:
    curriculum = posterior(1)
    assert curriculum.choose(1) == [0]
    curriculum.record(0, 0, 0)
    assert curriculum.beliefs.seen.tolist() == []
    assert curriculum.choose(1) == [0]


def test_the_same_seed_and_outcomes_choose_the_same_prompts() -> None:
    def run(seed: int) -> list[list[int]]:
        curriculum = posterior(2_000, seed=seed)
        chosen = []
        for version in range(40):
            chosen.append(curriculum.choose(50))
            for prompt in chosen[-1]:
                curriculum.record(prompt, prompt % 5, 4 if prompt % 5 in (0, 4) else 24)
            curriculum.advance(version)
        return chosen

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_seen_prompts_are_found_among_millions() -> None:
    curriculum = posterior(10_000_000)
    for prompt in range(2_000):
        curriculum.beliefs.add(prompt, *((12, 24) if prompt < 1_000 else (0, 4)))
    for _ in range(2_000):
        curriculum.beliefs.prior.add(0, 4)
    chosen = np.array(curriculum.choose(100))
    # 100 x 2 candidates are seen prompts, about 95 of them moderate and distinct; the uniform
    # share takes 10. Drawn from all, 400 candidates would contain 0.04 of the moderate ones.
    assert np.count_nonzero(chosen < 1_000) > 60


def test_ten_million_prompts_take_170_million_bytes_and_are_chosen_from_quickly() -> None:
    curriculum = posterior(10_000_000)
    assert curriculum.num_bytes == 10_000_000 * (4 + 4 + 4 + 4 + 1)
    times_s = []
    for _ in range(9):
        started_s = perf_counter()
        chosen = curriculum.choose(1_000)
        times_s.append(perf_counter() - started_s)
        for prompt in chosen:
            curriculum.record(prompt, 2, 24)
    # benchmarks/curriculum.py measures the time; this bound is loose because of noise.
    assert sorted(times_s)[4] < 0.25


# --- in the service ------------------------------------------------------------------------


def test_the_service_reports_every_end_and_every_version_to_the_curriculum(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path), curriculum={"kind": "posterior"})
    service = BufferService(
        config,
        num_prompts=4,
        num_held_out=1,
        fingerprint="f",
        started_s=0.0,
    )
    curriculum, lifecycle = service.components.curriculum, service.lifecycle
    assert isinstance(curriculum, PosteriorCurriculum)
    leases = lifecycle.grant_training("a", 4)
    assert leases is not None
    ids, prompts = leases.lease_ids, leases.prompt_ids
    assert sorted(prompts) == [0, 1, 2, 3]
    counts = ActorCounts()
    group = make_group(ids[0], prompts[0], rewards=(1, 0, 0, 0))
    lifecycle.group_finished("a", group, validate_group(group))
    lifecycle.screened_out(
        "a",
        m.ScreenedOut(
            lease_id=ids[1],
            num_passed=2,
            num_completions=2,
            num_truncated=0,
            num_tokens=4,
            counts=counts,
        ),
    )
    for lease_id, reason in ((ids[2], "verifier: x"), (ids[3], m.DRAINED)):
        lifecycle.failed(
            "a",
            m.LeaseFailed(
                lease_id=lease_id, reason=reason, num_completions=1, num_tokens=2, counts=counts
            ),
        )
    beliefs = curriculum.beliefs
    assert beliefs.seen.tolist() == prompts[:2]
    a, b = beliefs.prior.parameters
    alpha, beta = beliefs.posterior(np.array(prompts[:2]))
    assert alpha - a == pytest.approx([1, 2])
    assert beta - b == pytest.approx([3, 0])
    lifecycle.trained(
        m.Trained(
            policy_version=3,
            lease_ids=[],
            skipped=False,
            groups_trained=0,
            completions_trained=0,
            tokens_trained=0,
            metrics={},
        )
    )
    assert beliefs.policy_version == 3
    # Only the drained prompt is kept, for the next choice.
    leased_N = curriculum._lease_N  # pyright: ignore[reportPrivateUsage]
    assert np.flatnonzero(leased_N).tolist() == [prompts[3]]
    # The drained prompt first, then the others, which are all free again.
    granted = lifecycle.grant_training("a", 4)
    assert granted is not None
    assert granted.prompt_ids[0] == prompts[3]
    assert sorted(granted.prompt_ids) == [0, 1, 2, 3]


def test_without_a_gate_the_posterior_prefers_groups_whose_rewards_differ(tmp_path: Path) -> None:
    """Half of the prompts are never solved, a quarter always, and the rest half of the time."""
    gate = {"mode": "off", "n_init": 4, "n_cont": 0}
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path), gate=gate, curriculum={"kind": "posterior"})
    curriculum = make_curriculum(config, 400, new_curriculum_state(config, 400))
    rates = np.repeat([0.0, 1.0, 0.5], [200, 100, 100])
    random = np.random.default_rng(0)
    chosen: list[int] = []
    for version in range(60):
        curriculum.advance(version)
        chosen = curriculum.choose(24)
        for prompt in chosen:
            curriculum.record(prompt, int(random.binomial(4, rates[prompt])), 4)
    assert np.mean(rates[chosen] == 0.5) > 0.6  # 0.25 in uniform order
