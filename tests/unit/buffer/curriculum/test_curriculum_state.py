"""A restored curriculum continues exactly."""

import numpy as np

from speed_async.buffer.curriculum.curriculum import UniformCurriculum, UniformState
from speed_async.buffer.curriculum.posterior import PosteriorCurriculum, PosteriorState
from tests.fakes.buffer_fixtures import posterior, restored, screened


def test_a_restored_posterior_continues_exactly() -> None:
    rng = np.random.default_rng(4)
    state = PosteriorState.new(1_500, np.random.default_rng(0))
    curriculum = posterior(1_500, uniform_share=0.2, state=state)
    for version in range(30):
        chosen = curriculum.choose(64)
        curriculum.give_back(chosen[0])
        for prompt in chosen[1:-3]:
            curriculum.record(prompt, *screened(prompt / 1_500, rng))
        curriculum.advance(version)
        if version == 29:
            curriculum.give_back(chosen[-1])
    other = posterior(1_500, uniform_share=0.2, state=restored(state))

    def continued(one: PosteriorCurriculum) -> list[list[int]]:
        chosen = []
        for version in range(30, 60):
            chosen.append(one.choose(33))
            for prompt in chosen[-1]:
                one.record(prompt, prompt % 4, 4)
            one.advance(version)
        return chosen

    assert continued(other) == continued(curriculum)


def test_a_restored_uniform_continues_exactly() -> None:
    state = UniformState(rng=np.random.default_rng(0))
    curriculum = UniformCurriculum(20, state)
    curriculum.give_back(curriculum.choose(7)[3])
    other = UniformCurriculum(20, restored(state))
    assert [other.choose(9) for _ in range(9)] == [curriculum.choose(9) for _ in range(9)]
