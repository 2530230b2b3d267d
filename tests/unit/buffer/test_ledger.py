"""Leases by holder, and the running totals of the ledger against recomputed ones."""

import numpy as np
import pytest

from speed_async.buffer.durability.snapshot import capture, restore
from speed_async.buffer.leases import LeasesState, LeaseTable
from speed_async.buffer.ledger import Ledger
from speed_async.types import ActorCounts


def test_ledger_totals_equal_the_sums_over_its_actors() -> None:
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
    ledger.mark_lost("actor-3", 2, 1)  # its tokens in flight end; its generated tokens still count
    kept = [counts for name, counts in last.items() if name != "actor-3"]
    assert len(kept) == 7
    assert ledger.tokens_generated == sum(c.tokens_generated for c in last.values())
    assert ledger.completions_generated == sum(c.completions_generated for c in last.values())
    assert ledger.tokens_in_flight == sum(c.tokens_in_flight for c in kept)
    assert ledger.groups_continuing == sum(c.groups_continuing for c in kept)


def test_leases_are_listed_by_holder_oldest_first_until_they_end() -> None:
    table = LeaseTable(LeasesState())
    for prompt_id in range(6):
        suite, num_samples = ("hard", 3) if prompt_id == 4 else ("", 0)
        holder = f"actor-{prompt_id % 2}"
        table.grant(holder, prompt_id, suite=suite, num_samples=num_samples)
    assert table.num_training == 5
    table.end(2)
    assert [entry.lease.prompt_id for entry in table.of_holder("actor-0")] == [0, 4]
    assert table.num_training == 4
    table.end(4)
    assert table.num_training == 4  # it was an evaluation
    with pytest.raises(KeyError):
        table.end(4)
    table.end(0)
    assert table.of_holder("actor-0") == []
    assert [entry.lease.prompt_id for entry in table.of_holder("actor-1")] == [1, 3, 5]


def test_snapshot_restores_open_leases() -> None:
    state = LeasesState()
    table = LeaseTable(state)
    for prompt_id in range(4):
        table.grant(f"actor-{prompt_id % 2}", prompt_id)
    table.grant("actor-1", 0, suite="hard", num_samples=3)
    table.end(0)
    restored = LeaseTable(restore(LeasesState, capture(state)))
    assert restored.of_holder("actor-1") == table.of_holder("actor-1")
    assert restored.of_holder("actor-0") == table.of_holder("actor-0") != []
    assert restored.num_training == 3
    restored.end(3)
    restored.end(4)
    assert [entry.lease.prompt_id for entry in restored.of_holder("actor-1")] == [1]
    assert restored.grant("actor-0", 9).lease.lease_id == 5
