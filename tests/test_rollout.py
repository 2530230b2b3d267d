"""One lease from its prompt to its group: which reward belongs to which completion."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
from buffer_fixtures import make_config

from speed_async.actors.engine import GenerationRequest
from speed_async.actors.rollout import LeaseWork, Refused, Rollout, Scored
from speed_async.actors.scripted_engine import ScriptedEngine
from speed_async.config.schema import Config
from speed_async.tasks.scripted_verifier import ScriptedVerifier
from speed_async.types import Group, Int32Array, Lease, LeaseKind, Prompt

PROMPT = Prompt(prompt_id=0, text="p", answer="")


class Words:
    def encode(self, text: str) -> Int32Array:
        return np.array([len(text)], np.int32)

    def decode(self, token_ids: Int32Array) -> str:
        return " ".join(map(str, token_ids.tolist()))


def play(
    config: Config,
    script: Callable[[GenerationRequest, int], list[int]],
    verifier: ScriptedVerifier,
    *,
    kind: LeaseKind = LeaseKind.TRAINING,
    num_samples: int = 0,
) -> Group | Refused | Scored:
    async def scenario() -> Group | Refused | Scored:
        lease = Lease(lease_id=0, prompt_id=0, kind=kind, num_samples=num_samples)
        async with ScriptedEngine(script, num_slots=8) as engine:
            rollout = Rollout(config, engine, verifier, Words())
            return await rollout.run(LeaseWork(lease=lease), PROMPT)

    return asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_completion_keeps_its_own_reward_in_whatever_order_they_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path))  # 2 that screen, 2 more

    def earlier_ends_later(request: GenerationRequest, number: int) -> list[int]:
        return [number] * (9 - 2 * number)

    verifier = ScriptedVerifier(lambda _, completion: float(completion[0] in "03"))
    group = play(config, earlier_ends_later, verifier)
    assert isinstance(group, Group)
    first_tokens = [int(completion.sampled.token_ids[0]) for completion in group.completions]
    rewards = [completion.reward for completion in group.completions]
    assert dict(zip(first_tokens, rewards, strict=True)) == {0: 1.0, 1: 0.0, 2: 0.0, 3: 1.0}
    assert sorted(first_tokens[:2]) == [0, 1]
