"""Members and epochs of weight broadcasts, joining actors, and metrics of the broadcasts."""

from pathlib import Path

import pytest

from speed_async.transport import messages as m
from speed_async.transport.joining import Join, JoinAccepted, Leaving
from speed_async.types import ActorCounts, WeightOffer
from tests.fakes.buffer_fixtures import restored
from tests.fakes.service_harness import ServiceHarness, kinds, trained


@pytest.fixture
def harness(tmp_path: Path) -> ServiceHarness:
    """A run at version 5 that two actors have applied."""
    harness = ServiceHarness(tmp_path, cluster={"actors": 2}, run={"updates": 100})
    harness.pass_baseline()
    harness.hello("actor-2.0", 2)
    harness.send("learner", trained(5, [], groups=0, tokens=0))
    publish(harness, 5)
    published(harness, 5)
    applied(harness, "actor-1.0", 5)
    applied(harness, "actor-2.0", 5)
    return harness


def publish(
    harness: ServiceHarness, version: int
) -> tuple[dict[str, WeightOffer], m.WeightMembers]:
    message = m.PublishWeights(
        policy_version=version, store_host="h", store_port=1, backend="gloo", deadline_s=1.0
    )
    replies = harness.send("learner", message)
    [members] = [reply for _, reply in replies if isinstance(reply, m.WeightMembers)]
    return {peer: a.offer for peer, a in replies if isinstance(a, m.OfferWeights)}, members


def published(
    harness: ServiceHarness,
    version: int,
    *,
    error: str = "",
    missing: tuple[str, ...] = (),
    num_bytes: int = 0,
) -> None:
    harness.send(
        "learner",
        m.WeightsPublished(
            policy_version=version,
            epoch=0,
            transfer_s=0.5,
            num_bytes=num_bytes,
            error=error,
            missing=list(missing),
        ),
    )


def applied(harness: ServiceHarness, actor: str, version: int, pause_s: float = 0.25) -> None:
    harness.send(
        actor,
        m.WeightsApplied(
            policy_version=version,
            epoch=0,
            pause_s=pause_s,
            transfer_s=0.1,
            error="",
            counts=ActorCounts(),
        ),
    )


def not_applied(harness: ServiceHarness, actor: str, epoch: int) -> list[str]:
    message = m.WeightsApplied(
        policy_version=-1,
        epoch=epoch,
        pause_s=0,
        transfer_s=0,
        error="connection lost",
        counts=ActorCounts(),
    )
    return kinds(harness.send(actor, message))


def test_late_joiner_gets_a_separate_broadcast_before_its_first_lease(
    harness: ServiceHarness,
) -> None:
    before = harness.service.state.weight_group.epoch
    replies = harness.hello("actor-3.0", 3)
    assert kinds(replies) == ["MembershipChanged", "Welcome"]
    assert kinds(harness.send("actor-3.0", m.WantWork(num_prompts=2, counts=ActorCounts()))) == []
    offers, members = publish(harness, 5)
    assert list(offers) == ["actor-3.0"]
    assert (members.epoch, members.world_size) == (before + 1, 2)
    published(harness, 5)
    state = harness.service.membership.actors["actor-3.0"]
    assert state.want == 2
    applied(harness, "actor-3.0", 5)
    assert state.want == 0
    # The next version goes to all three actors in a new epoch, which then persists.
    offers, members = publish(harness, 6)
    assert {peer: offer.rank for peer, offer in offers.items()} == {
        "actor-1.0": 1,
        "actor-2.0": 2,
        "actor-3.0": 3,
    }
    assert members.epoch == before + 2
    published(harness, 6)
    assert publish(harness, 7)[1].epoch == before + 2


def test_joiner_gets_no_lease_even_if_version_0_is_fresh(
    tmp_path: Path,
) -> None:
    harness = ServiceHarness(tmp_path)  # max_staleness 1
    harness.pass_baseline()
    harness.send("learner", trained(1, [], groups=0, tokens=0))
    harness.hello("actor-2.0", 2)
    assert kinds(harness.send("actor-2.0", m.WantWork(num_prompts=1, counts=ActorCounts()))) == []
    applied(harness, "actor-2.0", 1)
    assert harness.service.membership.actors["actor-2.0"].want == 0


def test_broadcast_without_members_keeps_the_epoch(
    harness: ServiceHarness,
) -> None:
    before = harness.service.state.weight_group.epoch
    offers, members = publish(harness, 5)
    assert (offers, members.actor_names, members.world_size) == ({}, [], 1)
    published(harness, 5)
    assert publish(harness, 6)[1].epoch == before


def test_actor_that_is_still_applying_is_not_in_the_next_broadcast(
    harness: ServiceHarness,
) -> None:
    publish(harness, 6)
    published(harness, 6)
    applied(harness, "actor-1.0", 6)
    harness.hello("actor-3.0", 3)
    assert list(publish(harness, 6)[0]) == ["actor-3.0"]


def test_partially_failed_broadcast_is_repeated_only_for_actors_without_the_version(
    harness: ServiceHarness,
) -> None:
    first = publish(harness, 6)[1].epoch
    applied(harness, "actor-1.0", 6)  # it received all buckets before actor-2.0 failed
    published(harness, 6, error="bucket 2 failed")
    offers, members = publish(harness, 6)
    assert list(offers) == ["actor-2.0"]
    assert members.epoch == first + 1


def test_actor_missing_from_a_broadcast_is_lost_and_receives_the_reason(
    harness: ServiceHarness,
) -> None:
    publish(harness, 6)
    published(harness, 6, error="rank 2 never joined", missing=("actor-2.0", "actor-9.0"))
    assert list(publish(harness, 6)[0]) == ["actor-1.0"]
    replies = harness.send("actor-2.0", m.WantWork(num_prompts=1, counts=ActorCounts()))
    [(_, rejected)] = [reply for reply in replies if isinstance(reply[1], m.Rejected)]
    assert isinstance(rejected, m.Rejected)
    assert "it blocked the weight broadcast: rank 2 never joined" in rejected.reason
    assert kinds(harness.hello("actor-2.1", 2, incarnation=1)) == ["MembershipChanged", "Welcome"]


def test_the_learner_is_told_of_a_member_that_is_lost_during_a_broadcast(
    harness: ServiceHarness,
) -> None:
    harness.send("learner", trained(6, [], groups=0, tokens=0))
    publish(harness, 6)
    told = [reply for peer, reply in harness.hello("actor-2.1", 2) if peer == "learner"]
    assert [change.lost for change in told if isinstance(change, m.MembershipChanged)] == [
        [],  # actor-2.1 joined
        ["actor-2.0"],
    ]
    published(harness, 6, error="lost", missing=("actor-2.0",))
    told = [reply for peer, reply in harness.hello("actor-1.1", 1) if peer == "learner"]
    assert [change.lost for change in told if isinstance(change, m.MembershipChanged)] == [[]]


def test_actor_whose_load_failed_gets_the_version_again_in_either_message_order(
    harness: ServiceHarness,
) -> None:
    for version, applied_first in ((6, True), (7, False)):
        epoch = publish(harness, version)[1].epoch
        if not applied_first:
            published(harness, version)
        assert not_applied(harness, "actor-2.0", epoch) == ["MembershipChanged"]
        if applied_first:
            published(harness, version)
        offers, members = publish(harness, version)
        assert list(offers) == ["actor-2.0"]
        assert members.epoch == epoch + 1
        assert not_applied(harness, "actor-2.0", epoch) == []  # late, about the previous group
        published(harness, version)
        applied(harness, "actor-1.0", version)
        applied(harness, "actor-2.0", version)


def test_actor_may_use_several_ranks(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline()
    wide = m.Hello(
        role="actor", index=2, incarnation=0, fingerprint="f", process_id=1, weight_ranks=4
    )
    harness.send("actor-2.0", wide)
    harness.hello("actor-3.0", 3)
    offers, members = publish(harness, 1)
    assert {peer: (offer.rank, offer.world_size) for peer, offer in offers.items()} == {
        "actor-1.0": (1, 7),
        "actor-2.0": (2, 7),
        "actor-3.0": (6, 7),
    }
    assert (members.ranks_each, members.world_size) == ([1, 4, 1], 7)
    none = m.Hello(
        role="actor", index=4, incarnation=0, fingerprint="f", process_id=1, weight_ranks=0
    )
    [(_, refusal)] = harness.send("actor-4.0", none)
    assert isinstance(refusal, m.Rejected)
    assert "weight_ranks must be between 1 and" in refusal.reason


def test_leases_are_shared_by_the_actors_that_request_them(harness: ServiceHarness) -> None:
    assert harness.service.lifecycle.credits_left() == 4  # half a credit each
    for state in harness.service.membership.present():
        state.want = 20
    granted = harness.wait(0.1)
    sizes = {peer: len(a.lease_ids) for peer, a in granted if isinstance(a, m.Leases)}
    assert sizes == {"actor-1.0": 2, "actor-2.0": 2}


# --- joining and leaving ------------------------------------------------------------------------


def join(harness: ServiceHarness, supervisor: str) -> m.Message:
    [(_, reply)] = harness.send(supervisor, Join(machine="there", process_id=1))
    return reply


def totals(harness: ServiceHarness) -> tuple[object, object]:
    harness.wait(0.1)
    values = harness.events[-1].values
    return values["actors_alive"], values["actors_total"]


def test_joining_supervisor_gets_an_index_above_all_ranks(
    harness: ServiceHarness,
) -> None:
    first, repeated, second = (
        join(harness, "join-a"),
        join(harness, "join-a"),
        join(harness, "join-b"),
    )
    assert isinstance(first, JoinAccepted)
    assert isinstance(second, JoinAccepted)
    assert (first.index, second.index) == (3, 4)
    assert repeated == first
    assert '"name":"arithmetic"' in first.config
    harness.send("learner", m.FinishRun(policy_version=5, evaluate=False, reason="stopped"))
    late = join(harness, "join-c")
    assert isinstance(late, m.Rejected)
    assert "ending" in late.reason


def test_joining_rank_keeps_its_index_and_gets_a_new_incarnation(
    harness: ServiceHarness, tmp_path: Path
) -> None:
    def join_rank(of: ServiceHarness, supervisor: str) -> tuple[int, int]:
        join = Join(machine="there", process_id=1, has_rank=True, rank=2)
        reply = of.service.reply_without_record(supervisor, join, "")
        assert isinstance(reply, JoinAccepted)
        return reply.index, reply.incarnation

    assert join_rank(harness, "actor-2.join-a") == (2, 1)  # actor-2.0 is running
    harness.hello("actor-2.1", 2, incarnation=1)  # its supervisor was killed
    assert join_rank(harness, "actor-2.join-b") == (2, 2)
    assert totals(harness) == (2, 2)  # no joined actor is expected
    resumed = next_attempt(harness, tmp_path, actors=2)
    assert join_rank(resumed, "actor-2.join-c") == (2, 1000)
    resumed.send("learner", m.FinishRun(policy_version=5, evaluate=False, reason="stopped"))
    assert join_rank(resumed, "actor-2.join-d") == (2, 1000)
    resumed.send("actor-2.join-d", m.Failure(role="actor-2", message="no GPU"))
    assert resumed.service.ended  # the failure of a rank ends the run


def test_joined_actors_are_counted_until_they_leave(harness: ServiceHarness) -> None:
    join(harness, "join-a")
    assert totals(harness) == (2, 2)
    harness.hello("actor-3.0", 3)
    assert totals(harness) == (3, 3)
    assert kinds(harness.send("actor-3.0", Leaving(counts=ActorCounts()))) == ["Drain"]
    assert list(publish(harness, 6)[0]) == ["actor-1.0", "actor-2.0"]
    harness.send("actor-3.0", m.Goodbye(counts=ActorCounts()))
    assert totals(harness) == (2, 2)


def next_attempt(harness: ServiceHarness, folder: Path, *, actors: int) -> ServiceHarness:
    """The same run, resumed with another number of ranks."""
    resumed = ServiceHarness(
        folder,
        state=restored(harness.service.state),
        cluster={"actors": actors},
        run={"updates": 100},
    )
    resumed.service.begin_attempt(1)
    resumed.hello("learner", 0, incarnation=1)
    return resumed


def test_joined_actor_keeps_its_index_in_the_next_attempt(
    harness: ServiceHarness, tmp_path: Path
) -> None:
    join(harness, "join-a")
    harness.hello("actor-3.0", 3)
    for actors in (1, 2):
        resumed = next_attempt(harness, tmp_path, actors=actors)
        assert "Welcome" in kinds(resumed.hello("actor-3.1", 3, incarnation=1))
        newcomer = join(resumed, "join-b")
        assert isinstance(newcomer, JoinAccepted)
        assert newcomer.index == 4  # not the index of a present actor


def test_joining_a_run_with_fewer_ranks_does_not_reuse_the_index_of_a_rank(
    harness: ServiceHarness, tmp_path: Path
) -> None:
    """The former rank is lost, so a peer with its name is rejected."""
    resumed = next_attempt(harness, tmp_path, actors=1)
    newcomer = join(resumed, "join-a")
    assert isinstance(newcomer, JoinAccepted)
    assert newcomer.index == 3
    assert "Welcome" in kinds(resumed.hello("actor-3.0", 3))


def test_rank_takes_over_the_index_of_a_joined_actor(
    harness: ServiceHarness, tmp_path: Path
) -> None:
    join(harness, "join-a")
    harness.hello("actor-3.0", 3)
    resumed = next_attempt(harness, tmp_path, actors=3)
    assert "Welcome" in kinds(resumed.hello("actor-3.1000", 3, incarnation=1000))
    [(peer, refusal)] = resumed.hello("actor-3.1", 3, incarnation=1)
    assert peer == "actor-3.1"
    assert isinstance(refusal, m.Rejected)
    assert refusal.reason == (
        "the run was resumed with more ranks, and actor-3 is one of them now: join again to get "
        "another index"
    )
    resumed.send("join-a", m.Failure(role="actor-3", message=refusal.reason))
    assert not resumed.service.ended
    assert [state.name for state in resumed.service.membership.present()] == ["actor-3.1000"]
    assert totals(resumed) == (1, 3)
    newcomer = join(resumed, "join-b")
    assert isinstance(newcomer, JoinAccepted)
    assert newcomer.index == 4


def test_failure_of_a_joined_actor_does_not_end_the_run(harness: ServiceHarness) -> None:
    join(harness, "join-a")
    harness.hello("actor-3.0", 3)
    harness.send("join-a", m.Failure(role="actor-3", message="no such folder"))
    assert not harness.service.ended
    assert totals(harness) == (2, 2)
    assert harness.service.warning == "actor-3 left: no such folder"
    harness.send("actor-1.0", m.Failure(role="actor-1", message="broken"))
    assert harness.service.ended


# --- metrics --------------------------------------------------------------------------------------


def test_pauses_transfers_and_lags_are_reported(harness: ServiceHarness) -> None:
    harness.send("learner", trained(6, [], groups=0, tokens=0))
    publish(harness, 6)
    harness.wait(0.75)
    assert harness.events[-1].values["weights/publishing_s"] == 0.75
    published(harness, 6, num_bytes=1000)
    applied(harness, "actor-1.0", 6, pause_s=0.5)
    applied(harness, "actor-2.0", 6, pause_s=1.5)
    harness.send("learner", trained(7, [], groups=0, tokens=0))
    publish(harness, 7)
    published(harness, 7, error="x")
    harness.wait(0.1)
    values = harness.events[-1].values
    assert {key: value for key, value in values.items() if key.startswith("weights/")} == {
        "weights/pause_s": 1.0,
        "weights/pause_max_s": 1.5,
        "weights/transfer_s": 0.5,
        "weights/bytes_per_s": 2000.0,
        "weights/publishing_s": 0.0,
        "weights/failed": 1,
        "weights/newest": 2,
        "weights/lag_max": 1,
        "weights/lag/actor-1": 1,
        "weights/lag/actor-2": 1,
    }
    # Pauses: 0.25 twice (version 5), 0.5 and 1.5. Lags: 5 twice (first update), 1 four times.
    assert harness.service.state.weight_times.summary() == {
        "pause_s": 0.625,
        "transfer_s": 0.5,
        "bytes_per_s": 2000.0,
        "lag": 14 / 6,
        "broadcasts": 1,
        "failed": 1,
    }
