"""A restored curriculum continues exactly."""

from pathlib import Path

import numpy as np
import pytest

from speed_async.buffer.curriculum.curriculum import UniformCurriculum, make_curriculum
from speed_async.buffer.curriculum.posterior import PosteriorCurriculum
from tests.fakes.buffer_fixtures import make_config, posterior, screened


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
    other.restore(curriculum.state())

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
    other.restore(curriculum.state())
    assert [other.choose(9) for _ in range(9)] == [curriculum.choose(9) for _ in range(9)]


@pytest.mark.parametrize("kind", ["uniform", "posterior"])
def test_state_of_another_data_set_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path), curriculum={"kind": kind})
    curriculum = make_curriculum(config, 5, np.random.default_rng(0))
    state = make_curriculum(config, 6, np.random.default_rng(0)).state()
    with pytest.raises(ValueError, match="6 prompts, not 5"):
        curriculum.restore(state)
