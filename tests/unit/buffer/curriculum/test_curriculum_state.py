"""A restored curriculum continues exactly."""

import numpy as np

from speed_async.buffer.curriculum.curriculum import UniformCurriculum
from speed_async.buffer.curriculum.posterior import PosteriorCurriculum
from speed_async.buffer.durability.snapshot import capture, restore
from tests.fakes.buffer_fixtures import posterior, screened


def test_a_restored_posterior_continues_exactly() -> None:
    rng = np.random.default_rng(4)
    curriculum = posterior(1_500, uniform_share=0.2)
    for version in range(30):
        chosen = curriculum.choose(64)
        curriculum.give_back(chosen[0])
        for prompt in chosen[1:-3]:
            curriculum.record(prompt, *screened(prompt / 1_500, rng))
        curriculum.advance(version)
        if version == 29:
            curriculum.give_back(chosen[-1])
    other = posterior(1_500, uniform_share=0.2, seed=99)
    other.choose(10)
    restore(other, capture(curriculum))

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
    curriculum = UniformCurriculum(20, np.random.default_rng(0))
    curriculum.give_back(curriculum.choose(7)[3])
    other = UniformCurriculum(20, np.random.default_rng(1))
    restore(other, capture(curriculum))
    assert [other.choose(9) for _ in range(9)] == [curriculum.choose(9) for _ in range(9)]
