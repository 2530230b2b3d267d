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
from speed_async.buffer.statistics import RunStatistics
from speed_async.config.schema import Config, GateConfig
from speed_async.wire.messages import TakeBatch

ROUND_MARGIN = 1.15
"""A round is this much larger than the acceptance rate asks for: a second round costs more."""
STARVING_AFTER_S = 20.0
"""Then said again whenever the wait has doubled."""
STARVING_MIN_SCREENED = 64
STARVING_ACCEPTANCE = 0.02


class Batches:
    def __init__(self, config: Config, lifecycle: Lifecycle, statistics: RunStatistics) -> None:
        self.starved_s = 0.0
        """How long the last batch waited for groups."""
        self._config = config
        self._lifecycle = lifecycle
        self._statistics = statistics
        self._take: TakeBatch | None = None
        self._asked_s = 0.0
        self._next_warning_s = STARVING_AFTER_S
        self._screened_before = 0
        self._round_left = 0

    def ask(self, take: TakeBatch, now_s: float) -> None:
        self._take, self._asked_s = take, now_s
        self._next_warning_s = STARVING_AFTER_S
        self._screened_before = self._statistics.num_screened

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

    def newly_starving(self, now_s: float) -> str:
        """Why hardly any prompt passes the gate and what to change; empty while enough do, and
        until the wait has doubled since it was said."""
        screened = self._statistics.num_screened - self._screened_before
        acceptance = self._statistics.gate_acceptance
        if self._take is None or acceptance is None or acceptance >= STARVING_ACCEPTANCE:
            return ""
        waited_s = now_s - self._asked_s
        if waited_s < self._next_warning_s or screened < STARVING_MIN_SCREENED:
            return ""
        self._next_warning_s = 2 * waited_s
        return gate_starves(
            num_screened=screened,
            waited_s=waited_s,
            acceptance=acceptance,
            pass_rate=self._statistics.reward_mean or 0.0,
            gate=self._config.gate,
        )


def gate_starves(
    *, num_screened: int, waited_s: float, acceptance: float, pass_rate: float, gate: GateConfig
) -> str:
    return (
        f"the gate starves: {num_screened} prompts screened in {waited_s:.0f} s; of the last ones "
        f"{acceptance:.1%} passed ({gate.low} < pass rate < {gate.high}), mean pass rate "
        f"{pass_rate:.3f}. Remedy: {gate_remedy(gate, pass_rate)}"
    )


def gate_remedy(gate: GateConfig, pass_rate: float) -> str:
    """Which way to move when hardly any prompt passes; `pass_rate` is the mean of those seen."""
    if pass_rate <= max(gate.low, 0.1):
        lower = ", a lower gate.low" if gate.low > 0 else ""
        return (
            f"easier prompts, a larger gate.n_init{lower}, or a larger actors.max_new_tokens where "
            "answers are cut off"
        )
    if pass_rate >= min(gate.high, 0.9):
        higher = ", or a higher gate.high" if gate.high < 1 else ""
        return f"harder prompts, a larger gate.n_init{higher}"
    return "a wider band (gate.low, gate.high), or a larger gate.n_init"
