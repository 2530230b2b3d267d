"""What an actor reports about rewards: the outcomes of its verifier, and the mean of each part."""

from speed_async.actors.rollout import LeaseProgress
from speed_async.environments.outcome_lengths import OutcomeLengths
from speed_async.observability.rates import WindowedMean
from speed_async.types import LeaseKind

WINDOW_COMPLETIONS = 512
MAX_NAMES = 256
"""Maximum number of parts. A reward function may return new names forever."""
PREFIX = "reward/"


class RewardReport:
    def __init__(self) -> None:
        self._lengths = OutcomeLengths()
        self._means: dict[str, WindowedMean] = {}

    def add(self, work: LeaseProgress) -> None:
        """A lease ended, with or without a result."""
        for sample, outcome in work.verified:
            self._lengths.add(outcome, sample.num_tokens)
        if work.lease.kind is LeaseKind.EVALUATION:
            return
        for completion in work.completions:
            for name, value in completion.parts.items():
                if name not in self._means and len(self._means) == MAX_NAMES:
                    continue
                mean = self._means.setdefault(name, WindowedMean(num_values=WINDOW_COMPLETIONS))
                mean.add(value)

    def gauges(self) -> dict[str, float]:
        """Running sums of the outcomes since the start of the actor, and `reward/NAME`, the mean of
        each part over the last training completions."""
        means = {PREFIX + name: mean.mean or 0.0 for name, mean in self._means.items()}
        return self._lengths.sums | means
