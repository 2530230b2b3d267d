"""Small groups and messages for tests of the buffer service."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from speed_async.buffer.curriculum.posterior import PosteriorCurriculum, PosteriorState
from speed_async.buffer.durability.recovery import Build
from speed_async.buffer.durability.snapshot import State, capture, restore
from speed_async.buffer.service import BufferService
from speed_async.buffer.state import ServiceState
from speed_async.config.load import build_config
from speed_async.config.schema import Config
from speed_async.config.sections.curriculum import CurriculumConfig
from speed_async.config.sections.gate import GateConfig
from speed_async.transport.messages import GroupFinished
from speed_async.types import ActorCounts


class Fingerprints(TypedDict):
    data: str
    model: str


FINGERPRINTS = Fingerprints(data="f", model="")
"""Those of the services of these tests, as parameters of `open_machine`."""


def make_config(tmp_model: str, **sections: Mapping[str, object]) -> Config:
    tree: dict[str, Any] = {
        "algorithm": "speed-rloo",
        "model": {"path": tmp_model},
        "task": {"name": "arithmetic"},
        "gate": {"n_init": 2, "n_cont": 2},
        "learner": {"groups_per_update": 2},
        "buffer": {"capacity_groups": 8, "max_staleness": 1},
        "evaluate": {"every": 0},
        "run": {"updates": 2},
    }
    for name, fields in sections.items():
        tree.setdefault(name, {}).update(fields)
    return build_config(tree)


def builder(num_prompts: int = 100, *, num_held_out: int = 3, started_s: float = 0.0) -> Build:
    """Builds services with these prompts."""

    def build(config: Config, state: ServiceState | None) -> BufferService:
        return BufferService(
            config,
            num_prompts=num_prompts,
            num_held_out=num_held_out,
            suite_sizes={suite.name: 2 for suite in config.evaluate.suites},
            fingerprint="f",
            started_s=started_s,
            state=state,
        )

    return build


def make_suite(folder: Path, name: str, **fields: object) -> dict[str, object]:
    """Configuration of a suite, with an empty data file in `folder`."""
    path = folder / f"{name}.jsonl"
    path.touch()
    return {"name": name, "path": str(path), **fields}


def make_group(
    lease_id: int,
    prompt_id: int,
    *,
    rewards: Sequence[float] = (1, 0, 0, 1),
    version: int = 0,
    tokens_each: int = 3,
    counts: ActorCounts | None = None,
    num_screening: int = 2,
) -> GroupFinished:
    total = tokens_each * len(rewards)
    return GroupFinished(
        lease_id=lease_id,
        prompt_id=prompt_id,
        num_screening=num_screening,
        prompt_token_ids=np.array([5, 6], np.int32),
        lengths=np.full(len(rewards), tokens_each, np.int32),
        rewards=np.array(rewards, np.float32),
        passed=np.array([reward >= 1 for reward in rewards], np.int32),
        cut=np.zeros(len(rewards), np.int32),
        token_ids=np.arange(total, dtype=np.int32),
        logprobs=np.full(total, -0.5, np.float32),
        policy_versions=np.full(total, version, np.int32),
        counts=counts or ActorCounts(),
    )


def screened(theta: float, rng: np.random.Generator) -> tuple[int, int]:
    """(passed, completions) of one lease at pass rate theta: 4 completions, and 20 more if the
    first 4 have mixed outcomes."""
    passed = int(rng.binomial(4, theta))
    return (passed + int(rng.binomial(20, theta)), 24) if 0 < passed < 4 else (passed, 4)


def posterior(
    num_prompts: int,
    *,
    seed: int = 0,
    half_life_updates: float = 20.0,
    uniform_share: float = 0.1,
    candidates: int = 4,
    state: PosteriorState | None = None,
) -> PosteriorCurriculum:
    settings = CurriculumConfig(
        kind="posterior",
        half_life_updates=half_life_updates,
        uniform_share=uniform_share,
        candidates=candidates,
    )
    if state is None:
        state = PosteriorState.new(num_prompts, np.random.default_rng(seed))
    return PosteriorCurriculum(num_prompts, state, gate=GateConfig(), settings=settings)


def restored(state: State) -> State:
    """The state after a snapshot and its restoration."""
    return restore(type(state), capture(state))
