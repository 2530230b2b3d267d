"""Which completions an actor shows to people: a few, and now a passing, now a failing one."""

import math
from collections.abc import Callable

from speed_async.actors.rollout import LeaseWork, Refused, Scored
from speed_async.transport import messages as m
from speed_async.types import PASS_REWARD, ActorCounts, Completion, Group, LeaseKind, Prompt

MAX_TEXT_CHARS = 4000
"""Of a prompt or a completion; a longer one loses its middle."""


class SampleChoice:
    """At most one sample every `interval_s`."""

    def __init__(self, interval_s: float, *, is_gated: bool, clock: Callable[[], float]) -> None:
        """`is_gated`: whether a group is screened before the rest of it is generated."""
        self._interval_s = interval_s
        self._is_gated = is_gated
        self._clock = clock
        self._last_s = -math.inf
        self._wants_pass = True

    def choose(self, work: LeaseWork) -> Completion | None:
        """One of a finished lease's completions, or None while it is too early."""
        now_s = self._clock()
        if not work.completions or now_s - self._last_s < self._interval_s:
            return None
        self._last_s = now_s
        wanted = [c for c in work.completions if (c.reward >= PASS_REWARD) == self._wants_pass]
        chosen = (wanted or work.completions)[0]
        self._wants_pass = chosen.reward < PASS_REWARD
        return chosen

    def message(
        self,
        chosen: Completion,
        work: LeaseWork,
        prompt: Prompt,
        result: Group | Refused | Scored,
        text: str,
        counts: ActorCounts,
    ) -> m.Sample:
        """`text`: what the completion says."""
        sampled = chosen.sampled
        return m.Sample(
            policy_version=int(sampled.policy_versions.max(initial=0)),
            prompt_id=prompt.prompt_id,
            held_out=work.lease.kind is LeaseKind.EVALUATION,
            decision=self._decision(result),
            reward=chosen.reward,
            is_extracted=chosen.extracted is not None,
            extracted=shortened(chosen.extracted or ""),
            truncated=sampled.finish_reason == "length",
            num_tokens=sampled.num_tokens,
            prompt=shortened(prompt.text),
            completion=shortened(text),
            counts=counts,
        )

    def _decision(self, result: Group | Refused | Scored) -> str:
        match result:
            case Scored():
                return "evaluated"
            case Refused():
                return "screened out"
            case Group():
                return "continued" if self._is_gated else "kept"


def shortened(text: str, max_chars: int = MAX_TEXT_CHARS) -> str:
    """`text`, without its middle where it is too long, as UTF-8 can have it."""
    text = text.encode("utf-8", "replace").decode()
    if len(text) <= max_chars:
        return text
    mark = f" ... ({len(text) - max_chars} or more characters left out) ... "
    num_kept = max_chars - len(mark)
    return text[: num_kept - num_kept // 2] + mark + text[len(text) - num_kept // 2 :]
