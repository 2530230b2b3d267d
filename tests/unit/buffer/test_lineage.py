"""Lookup of the recorded updates that a resumed learner repeats."""

import time

from speed_async.buffer.lineage import Lineage
from speed_async.buffer.priority import BufferedGroup
from tests.fakes.buffer_fixtures import make_group
from tests.fakes.service_harness import trained


def group(lease_id: int) -> BufferedGroup:
    message = make_group(lease_id, lease_id)
    return BufferedGroup(
        message=message,
        lease_id=lease_id,
        place=(1, 0),
        pass_rate=0.5,
        oldest_version=0,
        mean_version=0.0,
        num_tokens=12,
        num_bytes=144,
    )


def make_lineage(*versions: int) -> Lineage:
    lineage, one = Lineage(), group(0)
    for version in versions:
        lineage.trained(trained(version, [0], 0, 0), [one])
    return lineage


def test_replay_is_possible_from_each_version_with_its_updates_recorded() -> None:
    lineage = make_lineage(*range(1, 9))
    assert [lineage.after(version).policy_version for version in range(8)] == [*range(1, 9)]  # type: ignore[union-attr]
    assert lineage.after(8) is None
    assert lineage.can_replay(0, 8)
    assert lineage.can_replay(8, 8)
    assert not lineage.can_replay(9, 8)
    assert not lineage.can_replay(0, 9)
    lineage.prune(3)
    assert lineage.after(2) is None
    assert not lineage.can_replay(2, 8)
    assert lineage.can_replay(3, 8)


def test_replay_is_impossible_across_a_gap() -> None:
    lineage = make_lineage(1, 2, 4)
    assert lineage.after(2) is None
    assert lineage.can_replay(0, 2)
    assert not lineage.can_replay(0, 4)
    assert lineage.can_replay(3, 4)


def test_replay_check_of_a_long_lineage_is_fast() -> None:
    """With `learner.checkpoint_every = 0`, all updates are kept; the check blocks the service."""
    lineage = make_lineage(*range(1, 30_001))
    started_s = time.thread_time()
    assert lineage.can_replay(0, 30_000)
    assert time.thread_time() - started_s < 2.0
