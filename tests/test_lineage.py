"""What a learner that comes back may have to train again is found by its version."""

import time

from buffer_fixtures import make_group
from service_harness import trained

from speed_async.buffer.group_table import BufferedGroup
from speed_async.buffer.lineage import Lineage


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


def lineage(*versions: int) -> Lineage:
    lineage, one = Lineage(), group(0)
    for version in versions:
        lineage.trained(trained(version, [0], 0, 0), [one])
    return lineage


def test_replay_is_possible_from_each_version_with_its_updates_recorded() -> None:
    lines = lineage(*range(1, 9))
    assert [lines.after(version).policy_version for version in range(8)] == [*range(1, 9)]  # type: ignore[union-attr]
    assert lines.after(8) is None
    assert lines.can_replay(0, 8)
    assert lines.can_replay(8, 8)
    assert not lines.can_replay(9, 8)
    assert not lines.can_replay(0, 9)
    lines.prune(3)
    assert lines.after(2) is None
    assert not lines.can_replay(2, 8)
    assert lines.can_replay(3, 8)


def test_replay_is_impossible_across_a_gap() -> None:
    lines = lineage(1, 2, 4)
    assert lines.after(2) is None
    assert lines.can_replay(0, 2)
    assert not lines.can_replay(0, 4)
    assert lines.can_replay(3, 4)


def test_replay_check_of_a_long_lineage_is_fast() -> None:
    """`learner.checkpoint_every = 0`: the service answers nobody meanwhile."""
    lines = lineage(*range(1, 30_001))
    began_s = time.process_time()
    assert lines.can_replay(0, 30_000)
    assert time.process_time() - began_s < 2.0
