"""An in-process verifier for tests, with a given reward function and recorded calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from speed_async.types import PASS_REWARD, Prompt, Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifierCall:
    prompt: Prompt
    completions: tuple[str, ...]


class ScriptedVerifier:
    """`reward` may raise TaskError, as a pool does; `calls` contains every call in order."""

    def __init__(self, reward: Callable[[Prompt, str], float]) -> None:
        self._reward = reward
        self.calls: list[VerifierCall] = []

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Verdict]:
        self.calls.append(VerifierCall(prompt=prompt, completions=tuple(completions)))
        rewards = [self._reward(prompt, completion) for completion in completions]
        return [Verdict(reward=reward, passed=reward >= PASS_REWARD) for reward in rewards]
