"""Who is offered which weights, in which epoch; and what is told of their travels."""

from pathlib import Path

import pytest
from service_desk import Desk, kinds, trained

from speed_async.buffer.durability.snapshot import capture, restore
from speed_async.transport import messages as m
from speed_async.transport.joining import Join, JoinAccepted, Leaving
from speed_async.types import ActorCounts


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A run at version 5 with two actors that hold it."""
    desk = Desk(tmp_path, cluster={"actors": 2}, run={"updates": 100})
    desk.past_baseline()
    desk.hello("actor-2.0", 2)
    desk.say("learner", trained(5, [], groups=0, tokens=0))
    publish(desk, 5)
    published(desk, 5)
    applied(desk, "actor-1.0", 5)
    applied(desk, "actor-2.0", 5)
    return desk


def publish(desk: Desk, version: int) -> tuple[dict[str, m.OfferWeights], m.WeightMembers]:
    message = m.PublishWeights(
        policy_version=version, store_host="h", store_port=1, backend="gloo", deadline_s=1.0
    )
    answers = desk.say("learner", message)
    [members] = [answer for _, answer in answers if isinstance(answer, m.WeightMembers)]
    return {peer: a for peer, a in answers if isinstance(a, m.OfferWeights)}, members


def published(
    desk: Desk, version: int, *, error: str = "", missing: tuple[str, ...] = (), num_bytes: int = 0
) -> None:
    desk.say(
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


def applied(desk: Desk, actor: str, version: int, pause_s: float = 0.25) -> None:
    desk.say(
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


def not_applied(desk: Desk, actor: str, epoch: int) -> list[str]:
    message = m.WeightsApplied(
        policy_version=-1,
        epoch=epoch,
        pause_s=0,
        transfer_s=0,
        error="cut off",
        counts=ActorCounts(),
    )
    return kinds(desk.say(actor, message))


def test_a_late_joiner_gets_a_snapshot_of_its_own_and_no_lease_before_it(desk: Desk) -> None:
    before = desk.service.learner.weight_group.epoch
    answers = desk.hello("actor-3.0", 3)
    assert kinds(answers) == ["MembershipChanged", "Welcome"]
    assert kinds(desk.say("actor-3.0", m.WantWork(num_prompts=2, counts=ActorCounts()))) == []
    offers, members = publish(desk, 5)
    assert list(offers) == ["actor-3.0"]
    assert (members.epoch, members.world_size) == (before + 1, 2)
    published(desk, 5)
    state = desk.service.membership.actors["actor-3.0"]
    assert state.want == 2
    applied(desk, "actor-3.0", 5)
    assert state.want == 0
    # The next version: everyone, in an epoch of all three; and it stays theirs.
    offers, members = publish(desk, 6)
    assert {peer: offer.rank for peer, offer in offers.items()} == {
        "actor-1.0": 1,
        "actor-2.0": 2,
        "actor-3.0": 3,
    }
    assert members.epoch == before + 2
    published(desk, 6)
    assert publish(desk, 7)[1].epoch == before + 2


def test_a_joiner_gets_no_lease_even_while_the_first_versions_are_fresh_enough(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path)  # max_staleness 1
    desk.past_baseline()
    desk.say("learner", trained(1, [], groups=0, tokens=0))
    desk.hello("actor-2.0", 2)
    assert kinds(desk.say("actor-2.0", m.WantWork(num_prompts=1, counts=ActorCounts()))) == []
    applied(desk, "actor-2.0", 1)
    assert desk.service.membership.actors["actor-2.0"].want == 0


def test_publishing_again_to_nobody_keeps_the_epoch_for_the_next_version(desk: Desk) -> None:
    before = desk.service.learner.weight_group.epoch
    offers, members = publish(desk, 5)
    assert (offers, members.actor_names, members.world_size) == ({}, [], 1)
    published(desk, 5)
    assert publish(desk, 6)[1].epoch == before


def test_an_actor_that_is_still_loading_is_not_disturbed_by_a_snapshot(desk: Desk) -> None:
    publish(desk, 6)
    published(desk, 6)
    applied(desk, "actor-1.0", 6)
    desk.hello("actor-3.0", 3)
    assert list(publish(desk, 6)[0]) == ["actor-3.0"]


def test_after_a_half_failed_broadcast_only_those_without_the_version_are_offered_it(
    desk: Desk,
) -> None:
    first = publish(desk, 6)[1].epoch
    applied(desk, "actor-1.0", 6)  # it got everything before the other one failed
    published(desk, 6, error="bucket 2 failed")
    offers, members = publish(desk, 6)
    assert list(offers) == ["actor-2.0"]
    assert members.epoch == first + 1


def test_who_is_missing_from_a_broadcast_is_lost_and_told_why(desk: Desk) -> None:
    publish(desk, 6)
    published(desk, 6, error="rank 2 never joined", missing=("actor-2.0", "actor-9.0"))
    assert list(publish(desk, 6)[0]) == ["actor-1.0"]
    answers = desk.say("actor-2.0", m.WantWork(num_prompts=1, counts=ActorCounts()))
    [(_, rejected)] = [answer for answer in answers if isinstance(answer[1], m.Rejected)]
    assert isinstance(rejected, m.Rejected)
    assert "it held up the weights: rank 2 never joined" in rejected.reason
    assert kinds(desk.hello("actor-2.1", 2, incarnation=1)) == ["MembershipChanged", "Welcome"]


def test_an_actor_whose_load_failed_gets_the_version_again_whichever_word_comes_first(
    desk: Desk,
) -> None:
    for version, word_first in ((6, True), (7, False)):
        epoch = publish(desk, version)[1].epoch
        if not word_first:
            published(desk, version)
        assert not_applied(desk, "actor-2.0", epoch) == ["MembershipChanged"]
        if word_first:
            published(desk, version)
        offers, members = publish(desk, version)
        assert list(offers) == ["actor-2.0"]
        assert members.epoch == epoch + 1
        assert not_applied(desk, "actor-2.0", epoch) == []  # late, about the group before
        published(desk, version)
        applied(desk, "actor-1.0", version)
        applied(desk, "actor-2.0", version)


def test_an_actor_may_take_several_ranks(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.past_baseline()
    wide = m.Hello(
        role="actor", index=2, incarnation=0, fingerprint="f", process_id=1, weight_ranks=4
    )
    desk.say("actor-2.0", wide)
    desk.hello("actor-3.0", 3)
    offers, members = publish(desk, 1)
    assert {peer: (offer.rank, offer.world_size) for peer, offer in offers.items()} == {
        "actor-1.0": (1, 7),
        "actor-2.0": (2, 7),
        "actor-3.0": (6, 7),
    }
    assert (members.ranks_each, members.world_size) == ([1, 4, 1], 7)
    none = m.Hello(
        role="actor", index=4, incarnation=0, fingerprint="f", process_id=1, weight_ranks=0
    )
    [(_, refusal)] = desk.say("actor-4.0", none)
    assert isinstance(refusal, m.Rejected)
    assert "weight_ranks must be between 1 and" in refusal.reason


def test_leases_are_shared_by_those_who_want_them(desk: Desk) -> None:
    assert desk.service.lifecycle.credits_left == 8
    for state in desk.service.membership.present():
        state.want = 20
    granted = desk.wait(0.1)
    sizes = {peer: len(a.lease_ids) for peer, a in granted if isinstance(a, m.Leases)}
    assert sizes == {"actor-1.0": 4, "actor-2.0": 4}


# --- coming and going ---------------------------------------------------------------------------


def join(desk: Desk, supervisor: str) -> m.Message:
    [(_, answer)] = desk.say(supervisor, Join(machine="there", process_id=1))
    return answer


def totals(desk: Desk) -> tuple[object, object]:
    desk.wait(0.1)
    values = desk.service.events[-1].values
    return values["actors_alive"], values["actors_total"]


def test_a_supervisor_that_joins_gets_an_index_beyond_the_ranks_and_the_config(desk: Desk) -> None:
    first, again, second = join(desk, "join-a"), join(desk, "join-a"), join(desk, "join-b")
    assert isinstance(first, JoinAccepted)
    assert isinstance(second, JoinAccepted)
    assert (first.index, second.index) == (3, 4)
    assert again == first
    assert '"name":"arithmetic"' in first.config
    desk.say("learner", m.FinishRun(policy_version=5, evaluate=False, reason="stopped"))
    late = join(desk, "join-c")
    assert isinstance(late, m.Rejected)
    assert "ending" in late.reason


def test_a_rank_that_asks_keeps_its_index_and_is_never_given_a_name_twice(
    desk: Desk, tmp_path: Path
) -> None:
    def place(of: Desk, supervisor: str) -> tuple[int, int]:
        join = Join(machine="there", process_id=1, has_rank=True, rank=2)
        answer = of.service.at_once(supervisor, join, "")
        assert isinstance(answer, JoinAccepted)
        return answer.index, answer.incarnation

    assert place(desk, "actor-2.join-a") == (2, 1)  # actor-2.0 is here
    desk.hello("actor-2.1", 2, incarnation=1)  # its supervisor was killed
    assert place(desk, "actor-2.join-b") == (2, 2)
    assert totals(desk) == (2, 2)  # no actor beside the ranks is expected
    again = next_life(desk, tmp_path, actors=2)
    assert place(again, "actor-2.join-c") == (2, 1000)
    again.say("learner", m.FinishRun(policy_version=5, evaluate=False, reason="stopped"))
    assert place(again, "actor-2.join-d") == (2, 1000)
    again.say("actor-2.join-d", m.Failure(role="actor-2", message="no GPU"))
    assert again.service.ended  # a rank's failure is the run's


def test_those_who_joined_are_counted_until_they_leave(desk: Desk) -> None:
    join(desk, "join-a")
    assert totals(desk) == (2, 2)
    desk.hello("actor-3.0", 3)
    assert totals(desk) == (3, 3)
    assert kinds(desk.say("actor-3.0", Leaving(counts=ActorCounts()))) == ["Drain"]
    assert list(publish(desk, 6)[0]) == ["actor-1.0", "actor-2.0"]
    desk.say("actor-3.0", m.Goodbye(counts=ActorCounts()))
    assert totals(desk) == (2, 2)


def next_life(desk: Desk, folder: Path, *, actors: int) -> Desk:
    """The same run, started again with another number of ranks."""
    again = Desk(folder, cluster={"actors": actors}, run={"updates": 100})
    restore(again.service, capture(desk.service))
    again.service.begin_attempt(1, 0.0)
    again.hello("learner", 0, incarnation=1)
    return again


def test_one_that_joined_goes_on_in_the_next_life_with_its_index(
    desk: Desk, tmp_path: Path
) -> None:
    join(desk, "join-a")
    desk.hello("actor-3.0", 3)
    for actors in (1, 2):
        again = next_life(desk, tmp_path, actors=actors)
        assert "Welcome" in kinds(again.hello("actor-3.1", 3, incarnation=1))
        newcomer = join(again, "join-b")
        assert isinstance(newcomer, JoinAccepted)
        assert newcomer.index == 4  # not that of one who is here


def test_one_that_joins_a_run_that_has_fewer_ranks_now_is_not_taken_for_one_of_them(
    desk: Desk, tmp_path: Path
) -> None:
    """The rank's name was given up as lost, and whoever bears it is refused."""
    again = next_life(desk, tmp_path, actors=1)
    newcomer = join(again, "join-a")
    assert isinstance(newcomer, JoinAccepted)
    assert newcomer.index == 3
    assert "Welcome" in kinds(again.hello("actor-3.0", 3))


def test_one_that_joined_gives_way_to_a_rank_that_has_its_index_now(
    desk: Desk, tmp_path: Path
) -> None:
    join(desk, "join-a")
    desk.hello("actor-3.0", 3)
    again = next_life(desk, tmp_path, actors=3)
    assert "Welcome" in kinds(again.hello("actor-3.1000", 3, incarnation=1000))
    [(peer, refusal)] = again.hello("actor-3.1", 3, incarnation=1)
    assert peer == "actor-3.1"
    assert isinstance(refusal, m.Rejected)
    assert refusal.reason == (
        "the run goes on with more ranks, one of which is actor-3 now: join again to be given "
        "another index"
    )
    again.say("join-a", m.Failure(role="actor-3", message=refusal.reason))
    assert not again.service.ended
    assert [state.name for state in again.service.membership.present()] == ["actor-3.1000"]
    assert totals(again) == (1, 3)
    newcomer = join(again, "join-b")
    assert isinstance(newcomer, JoinAccepted)
    assert newcomer.index == 4


def test_the_failure_of_one_that_joined_is_its_own(desk: Desk) -> None:
    join(desk, "join-a")
    desk.hello("actor-3.0", 3)
    desk.say("join-a", m.Failure(role="actor-3", message="no such folder"))
    assert not desk.service.ended
    assert totals(desk) == (2, 2)
    assert desk.service.warning == "actor-3 left: no such folder"
    desk.say("actor-1.0", m.Failure(role="actor-1", message="broken"))
    assert desk.service.ended


# --- figures --------------------------------------------------------------------------------------


def test_pauses_transfers_and_lags_are_told(desk: Desk) -> None:
    desk.say("learner", trained(6, [], groups=0, tokens=0))
    publish(desk, 6)
    desk.wait(0.75)
    assert desk.service.events[-1].values["weights/publishing_s"] == 0.75
    published(desk, 6, num_bytes=1000)
    applied(desk, "actor-1.0", 6, pause_s=0.5)
    applied(desk, "actor-2.0", 6, pause_s=1.5)
    desk.say("learner", trained(7, [], groups=0, tokens=0))
    publish(desk, 7)
    published(desk, 7, error="x")
    desk.wait(0.1)
    values = desk.service.events[-1].values
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
    # Pauses: 0.25 twice (version 5), 0.5, 1.5. Lags: two of 5 (the first update), four of 1.
    assert desk.service.learner.weight_times.summary() == {
        "pause_s": 0.625,
        "transfer_s": 0.5,
        "bytes_per_s": 2000.0,
        "lag": 14 / 6,
        "broadcasts": 1,
        "failed": 1,
    }
