"""Bounds the tokens of evaluations by those of training, over the whole run.

Evaluation leases that take part in it are granted while their tokens are at most
`evaluate.max_share` of the tokens of the training groups that are no longer in flight. An open
lease counts with the mean tokens of its suite until it ends, and then with its own, so that an
evaluation much longer than expected delays later ones. A granted lease always ends, whatever
training does.
"""

from dataclasses import dataclass, field

from speed_async.buffer.ledger import Ledger, Tally


@dataclass(kw_only=True, slots=True)
class EvaluationBudgetState:
    spent_tokens: float = 0.0
    """Tokens of the bounded leases: of ended ones, and the expected ones of open leases and of
    those that ended with their actor."""
    ended: dict[str, Tally] = field(default_factory=dict)
    """All ended evaluation leases, by suite."""


class EvaluationBudget:
    def __init__(self, max_share: float, ledger: Ledger, state: EvaluationBudgetState) -> None:
        self._max_share = max_share
        self._ledger = ledger
        self._state = state

    def num_leases(self, suite: str) -> int:
        """Leases of this suite that may be granted now."""
        left = self._max_share * self._ledger.training_tokens - self._state.spent_tokens
        return max(0, int(left / self._expected_tokens(suite)))

    def reserve(self, suite: str) -> float:
        """Charge a lease of this suite. Returns its expected tokens."""
        expected = self._expected_tokens(suite)
        self._state.spent_tokens += expected
        return expected

    def end(self, suite: str, num_tokens: int, reserved_tokens: float | None) -> None:
        """A lease ended with this many tokens. `reserved_tokens` None: it was not charged."""
        self._state.ended.setdefault(suite, Tally()).add(num_tokens)
        if reserved_tokens is not None:
            self._state.spent_tokens += num_tokens - reserved_tokens

    def _expected_tokens(self, suite: str) -> float:
        """Mean tokens of a lease of this suite; the first evaluation, which is not bounded, has
        ended. At least 1, as all may fail without any token."""
        ended = self._state.ended.get(suite, Tally())
        return max(1.0, ended.tokens / max(ended.groups, 1))
