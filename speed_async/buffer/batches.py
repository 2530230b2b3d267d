"""The learner's request for a batch: what may be generated for it, when it is answered, how long
it has waited. Pure decisions; service.py acts on them.

With `run.overlap` actors generate whatever the credits allow, and a batch is answered as soon as
it is full. Without, generation and training take turns: prompts are granted only while the learner
waits, in rounds large enough to fill the batch, and the batch is answered when the round is over
and nothing is being generated. What a round yields beyond the batch is kept for the next.
"""

import math

from speed_async.buffer.lifecycle import Lifecycle
from speed_async.buffer.priority import BufferedGroup
from speed_async.config.schema import Config
from speed_async.transport.messages import TakeBatch

ROUND_MARGIN = 1.15
"""A round is this much larger than the acceptance rate asks for: a second round costs more."""


class Batches:
    def __init__(self, config: Config, lifecycle: Lifecycle) -> None:
        self.starved_s = 0.0
        """How long the last batch waited for groups."""
        self._config = config
        self._lifecycle = lifecycle
        self._take: TakeBatch | None = None
        self._asked_s = 0.0
        self._round_left = 0

    def ask(self, take: TakeBatch, now_s: float) -> None:
        self._take, self._asked_s = take, now_s

    def withdraw(self) -> None:
        self._take, self._round_left = None, 0

    @property
    def num_grantable(self) -> int:
        """Training leases that may be granted now."""
        credits_left = self._lifecycle.credits_left
        if self._config.run.overlap:
            return credits_left
        if self._take is None:
            return 0
        missing = self._take.num_groups - len(self._lifecycle.buffer)
        if not self._round_left and missing > 0 and not self._lifecycle.leases.num_charged:
            self._round_left = self._round_of(missing)
        return min(self._round_left, credits_left)

    def granted(self, num_leases: int) -> None:
        self._round_left = max(0, self._round_left - num_leases)

    def _round_of(self, missing: int) -> int:
        if self._config.gate.mode == "off":
            return missing
        return math.ceil(missing * ROUND_MARGIN / self._lifecycle.credit.price)

    def answer(
        self, now_s: float, *, evaluating: bool
    ) -> tuple[TakeBatch, list[BufferedGroup]] | None:
        """The batch that was asked for, once it may be given."""
        if self._take is None:
            return None
        if not self._config.run.overlap and (evaluating or self._lifecycle.leases.num_charged):
            return None
        groups = self._lifecycle.take(self._take.num_groups)
        if groups is None:
            return None
        take = self._take
        self.starved_s = now_s - self._asked_s
        self.withdraw()
        return take, groups

    def stalled(self, now_s: float) -> bool:
        return (
            self._take is not None and now_s - self._asked_s >= self._config.cluster.stall_timeout_s
        )

    def waited_s(self, now_s: float) -> float | None:
        """How long the learner has waited for a batch; None when it asks for none."""
        return None if self._take is None else now_s - self._asked_s
