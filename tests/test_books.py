"""Leases by holder and the ledger's running sums, against counts made from scratch."""

import numpy as np
import pytest

from speed_async.buffer.durability.snapshot import capture, restore
from speed_async.buffer.leases import LeaseTable
from speed_async.buffer.ledger import Ledger
from speed_async.types import ActorCounts, LeaseKind


def test_the_ledgers_sums_are_those_of_its_actors() -> None:
    rng = np.random.default_rng(0)
    ledger = Ledger()
    last: dict[str, ActorCounts] = {}
    for _ in range(300):
        name = f"actor-{rng.integers(8)}"
        tokens, completions, in_flight, continuing = map(int, rng.integers(0, 1000, 4))
        last[name] = ActorCounts(
            tokens_generated=tokens,
            completions_generated=completions,
            tokens_in_flight=in_flight,
            groups_continuing=continuing,
        )
        ledger.update_counts(name, last[name])
    ledger.mark_lost("actor-3", 2, 1)  # what it held ends; what it generated stays
    kept = [counts for name, counts in last.items() if name != "actor-3"]
    assert len(kept) == 7
    assert ledger.tokens_generated == sum(c.tokens_generated for c in last.values())
    assert ledger.completions_generated == sum(c.completions_generated for c in last.values())
    assert ledger.tokens_in_flight == sum(c.tokens_in_flight for c in kept)
    assert ledger.groups_continuing == sum(c.groups_continuing for c in kept)


def test_a_holder_has_its_own_leases_oldest_first_until_they_end() -> None:
    book = LeaseTable()
    for prompt_id in range(6):
        kind = LeaseKind.EVALUATION if prompt_id == 4 else LeaseKind.TRAINING
        book.grant(f"actor-{prompt_id % 2}", prompt_id, kind)
    assert book.num_training == 5
    book.end(2)
    assert [entry.lease.prompt_id for entry in book.of_holder("actor-0")] == [0, 4]
    assert book.num_training == 4
    book.end(4)
    assert book.num_training == 4  # it was an evaluation
    with pytest.raises(KeyError):
        book.end(4)
    book.end(0)
    assert book.of_holder("actor-0") == []
    assert [entry.lease.prompt_id for entry in book.of_holder("actor-1")] == [1, 3, 5]


def test_open_leases_go_into_a_snapshot_and_come_back() -> None:
    book = LeaseTable()
    for prompt_id in range(4):
        book.grant(f"actor-{prompt_id % 2}", prompt_id, LeaseKind.TRAINING)
    book.end(0)
    again = LeaseTable()
    restore(again, capture(book))
    assert again.of_holder("actor-1") == book.of_holder("actor-1")
    assert again.of_holder("actor-0") == book.of_holder("actor-0") != []
    assert again.num_training == 3
    again.end(3)
    assert [entry.lease.prompt_id for entry in again.of_holder("actor-1")] == [1]
    assert again.grant("actor-0", 9, LeaseKind.TRAINING).lease.lease_id == 4
