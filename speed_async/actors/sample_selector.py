"""Selects completions to display as samples, alternating between passing and failing ones."""

import math
from collections.abc import Callable

from speed_async.actors.rollout import LeaseProgress
from speed_async.transport import messages as m
from speed_async.types import ActorCounts, Completion, LeaseKind, Prompt


class SampleSelector:
    """Selects at most one sample every `interval_s` seconds."""

    def __init__(self, interval_s: float, *, is_gated: bool, clock: Callable[[], float]) -> None:
        """`is_gated`: whether groups are screened before their continuation."""
        self._interval_s = interval_s
        self._is_gated = is_gated
        self._clock = clock
        self._last_s = -math.inf
        self._wants_pass = True

    def select(self, work: LeaseProgress) -> Completion | None:
        """One of a finished lease's completions, or None when the interval has not elapsed."""
        now_s = self._clock()
        if not work.completions or now_s - self._last_s < self._interval_s:
            return None
        self._last_s = now_s
        wanted = [c for c in work.completions if c.passed == self._wants_pass]
        selected = (wanted or work.completions)[0]
        self._wants_pass = not selected.passed
        return selected

    def message(
        self,
        selected: Completion,
        work: LeaseProgress,
        prompt: Prompt,
        text: str,
        counts: ActorCounts,
    ) -> m.Sample:
        """`text` is the decoded completion."""
        sampled = selected.sampled
        return m.Sample(
            policy_version=int(sampled.policy_versions.max(initial=0)),
            prompt_id=prompt.prompt_id,
            held_out=work.lease.kind is LeaseKind.EVALUATION,
            decision=self._decision(work),
            reward=selected.reward,
            passed=selected.passed,
            is_extracted=selected.extracted is not None,
            extracted=selected.extracted or "",
            truncated=sampled.finish_reason == "length",
            num_tokens=sampled.num_tokens,
            prompt=prompt.text,
            completion=text,
            counts=counts,
        )

    def _decision(self, work: LeaseProgress) -> str:
        if work.lease.kind is LeaseKind.EVALUATION:
            return "evaluated"
        if not work.continuing:
            return "screened out"
        return "continued" if self._is_gated else "kept"
