"""How many evaluation leases may be granted."""

import pytest

from speed_async.buffer.evaluation_budget import EvaluationBudget, EvaluationBudgetState
from speed_async.buffer.ledger import Ledger
from speed_async.types import ActorCounts


def budget(ledger: Ledger, max_share: float = 0.1) -> EvaluationBudget:
    """The first evaluation of `hard` had two leases, of 20 and 40 tokens."""
    made = EvaluationBudget(max_share, ledger, EvaluationBudgetState())
    for num_tokens in (20, 40):
        ledger.evaluation.add(num_tokens)
        made.end("hard", num_tokens, None)
    return made


def train(ledger: Ledger, num_tokens: int) -> None:
    """The engines have generated this many tokens for training, and 7 more are in flight."""
    generated = num_tokens + ledger.evaluation.tokens + 7
    ledger.update_counts("a", ActorCounts(tokens_generated=generated, tokens_in_flight=7))


def test_leases_are_granted_up_to_the_share_with_the_mean_length_of_their_suite() -> None:
    ledger = Ledger()
    hard = budget(ledger)
    assert hard.num_leases("hard") == 0
    train(ledger, 299)
    assert hard.num_leases("hard") == 0
    train(ledger, 300)
    assert hard.num_leases("hard") == 1
    assert hard.reserve("hard") == pytest.approx(30)
    assert hard.num_leases("hard") == 0
    train(ledger, 1500)
    assert hard.num_leases("hard") == 4  # the first evaluation is not charged


def test_a_lease_that_is_longer_or_shorter_than_expected_is_charged_its_own_tokens() -> None:
    ledger = Ledger()
    hard = budget(ledger)
    train(ledger, 600)
    first, second = hard.reserve("hard"), hard.reserve("hard")
    hard.end("hard", 330, first)  # 300 too many
    ledger.evaluation.add(330)
    train(ledger, 3600)
    assert hard.num_leases("hard") == 0  # 360 are spent
    hard.end("hard", 10, second)  # leases have now 100 tokens on average
    ledger.evaluation.add(10)
    train(ledger, 4400)
    assert hard.num_leases("hard") == 1  # 340 are spent


def test_a_suite_whose_first_evaluation_had_no_tokens_is_still_bounded() -> None:
    ledger = Ledger()
    empty = EvaluationBudget(0.1, ledger, EvaluationBudgetState())
    empty.end("failing", 0, None)
    train(ledger, 20)
    assert empty.num_leases("failing") == 2
