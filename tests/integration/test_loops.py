"""Actor, service and learner loops together, over the in-process transport.

The three loops are the real code. The engine and the verifier are scripted, and the trainer only
counts updates.
"""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from speed_async.actors.engine import GenerationRequest
from speed_async.actors.loop import ActorLoop
from speed_async.actors.rollout import Rollout
from speed_async.actors.stepped_engine.engine import SteppedEngine
from speed_async.actors.stepped_engine.worker import ThreadWorker
from speed_async.buffer.durability.recovery import open_machine
from speed_async.buffer.server import serve
from speed_async.buffer.state_machine import StateMachine
from speed_async.errors import RoleError, WeightSyncError
from speed_async.learner.inbox import Stop
from speed_async.learner.loop import LearnerLoop
from speed_async.learner.progress import RunResult
from speed_async.testing.inprocess_transport import InProcessHub, InProcessLink
from speed_async.testing.memory_channel import MemorySender, MemoryStore
from speed_async.testing.scripted_engine import ScriptedStepper
from speed_async.transport import messages as m
from speed_async.transport.feed import FeedPublisher
from speed_async.transport.session import SessionLink
from speed_async.types import WeightOffer
from speed_async.weight_sync.canary_check import Canary
from tests.fakes.buffer_fixtures import FINGERPRINTS, make_config, make_group, make_suite
from tests.fakes.loop_run import (
    CharCodec,
    CountingUpdates,
    DigitTask,
    InlineVerifier,
    Run,
    execute,
    make_service,
)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    (tmp_path / "config.json").write_text("{}")

    def make(num_actors: int = 2, **sections: dict[str, object]) -> Run:
        sections.setdefault("run", {"updates": 5})
        sections.setdefault("actors", {"slots": 16, "max_new_tokens": 8})
        sections.setdefault("evaluate", {"every": 2, "num_samples": 2})
        return Run(make_config(str(tmp_path), **sections), num_actors)

    return make


@pytest.mark.parametrize("durability", ["batched", "every"])
def test_groups_above_the_memory_limit_are_spilled_to_the_journal_and_trained(
    make_run: Callable[..., Run], tmp_path: Path, durability: str
) -> None:
    buffer = {"capacity_groups": 8, "spill": True, "durability": durability}
    run = make_run(buffer=buffer)
    buffer_config = run.config.buffer.model_copy(update={"capacity_bytes": 1})
    config = run.config.model_copy(update={"buffer": buffer_config})
    run.config = config
    service = make_service(config, run.task)
    folder = tmp_path / "journal"
    machine, _ = open_machine(folder, config, lambda *_: service, **FINGERPRINTS, attempt=0)
    finished = asyncio.run(asyncio.wait_for(run.execute(machine), 30))
    assert finished.outcome == "completed"
    assert len(run.updates.batches) == 5
    lease_ids = [group.lease_id for batch in run.updates.batches for group in batch]
    assert len(set(lease_ids)) == len(lease_ids)
    assert machine.service.lifecycle.groups.buffer.num_bytes == 0
    table = finished.service_fields["ledger"]
    assert isinstance(table, dict) and table["closes"]


def test_run_trains_every_batch_and_its_ledger_balances(make_run: Callable[..., Run]) -> None:
    run = make_run()
    finished = execute(run)
    assert finished.outcome == "completed"
    assert finished.progress.optimizer_updates == 5
    assert run.updates.saved == [5]
    ledger = finished.service_fields["ledger"]
    assert isinstance(ledger, dict)
    assert ledger["checks"] == dict.fromkeys(ledger["checks"], True)
    assert ledger["groups"]["trained"] == 10
    trained = sum(group.num_tokens for batch in run.updates.batches for group in batch)
    assert ledger["tokens"]["trained"] == trained == finished.progress.tokens_trained
    # The engines' token counts equal the ledger's "generated".
    assert ledger["tokens"]["generated"] == sum(e.stats.tokens_generated for e in run.engines)


def test_a_group_may_have_one_completion(make_run: Callable[..., Run]) -> None:
    run = make_run(
        gate={"mode": "off", "n_init": 1, "n_cont": 0},
        objective={"advantage": "shrunken"},
    )
    finished = execute(run)
    assert finished.outcome == "completed"
    groups = [group for batch in run.updates.batches for group in batch]
    assert [len(group.completions) for group in groups] == [1] * 10
    ledger = finished.service_fields["ledger"]
    assert isinstance(ledger, dict) and ledger["closes"]


def test_every_version_is_published_with_its_canary(
    make_run: Callable[..., Run],
) -> None:
    run = make_run()
    execute(run)
    assert run.canaries == {
        version: Canary(token_ids=(0, 1), logprobs=(-float(version),)) for version in range(1, 6)
    }


def test_only_prompts_of_moderate_difficulty_are_continued(make_run: Callable[..., Run]) -> None:
    run = make_run()
    finished = execute(run)
    trained = {group.prompt_id for batch in run.updates.batches for group in batch}
    assert trained
    assert all(prompt_id % 2 == 0 for prompt_id in trained)
    for batch in run.updates.batches:
        for group in batch:
            assert len(group.completions) == 4
            screening = [completion.reward for completion in group.completions[:2]]
            assert 0 < sum(screening) < 2
    acceptance = finished.service_fields["gate_acceptance"]
    assert isinstance(acceptance, float)
    assert 0 < acceptance < 1


def test_filter_mode_samples_whole_groups_and_keeps_mixed_ones(
    make_run: Callable[..., Run],
) -> None:
    run = make_run(gate={"mode": "filter"})
    finished = execute(run)
    groups = [group for batch in run.updates.batches for group in batch]
    assert len(groups) == 10
    for group in groups:
        assert group.num_screening == len(group.completions) == 4
        assert 0 < group.num_passed < 4
    ledger = finished.service_fields["ledger"]
    assert isinstance(ledger, dict)
    assert ledger["groups"]["screened_out"] > 0
    assert ledger["checks"] == dict.fromkeys(ledger["checks"], True)


def test_gate_off_also_trains_unsolvable_prompts(
    make_run: Callable[..., Run],
) -> None:
    run = make_run(gate={"mode": "off"})
    finished = execute(run)
    groups = [group for batch in run.updates.batches for group in batch]
    assert {group.num_screening for group in groups} == {0}
    assert {group.prompt_id % 2 for group in groups} == {0, 1}
    ledger = finished.service_fields["ledger"]
    assert isinstance(ledger, dict)
    assert ledger["groups"]["screened_out"] == 0


def test_without_overlap_all_tokens_are_on_policy(
    make_run: Callable[..., Run],
) -> None:
    run = make_run(run={"updates": 6, "overlap": False}, gate={"mode": "off"})
    finished = execute(run)
    assert finished.outcome == "completed"
    for policy_version, batch in enumerate(run.updates.batches):
        for group in batch:
            for completion in group.completions:
                versions = completion.sampled.policy_versions
                assert versions.tolist() == [policy_version] * len(versions)


def test_without_overlap_surplus_groups_are_kept(
    make_run: Callable[..., Run],
) -> None:
    run = make_run(run={"updates": 8, "overlap": False})
    finished = execute(run)
    assert finished.outcome == "completed"
    ages = {
        policy_version - group.oldest_version
        for policy_version, batch in enumerate(run.updates.batches)
        for group in batch
    }
    assert ages <= {0, 1}
    ledger = finished.service_fields["ledger"]
    assert isinstance(ledger, dict)
    assert ledger["checks"] == dict.fromkeys(ledger["checks"], True)


def test_run_stops_at_the_target_accuracy(make_run: Callable[..., Run]) -> None:
    run = make_run(run={"updates": 10_000, "stop_at_accuracy": 0.01})
    finished = execute(run)
    assert finished.outcome == "completed"
    assert finished.progress.policy_version < 10_000
    assert finished.reason.startswith("accuracy 0.")
    assert "reached at version" in finished.reason
    assert finished.accuracy_reached is not None
    assert 0.01 <= finished.accuracy_reached <= 1
    assert finished.service_fields["accuracy_last"] is not None
    assert run.updates.saved == [finished.progress.policy_version]


def test_no_token_exceeds_max_staleness(make_run: Callable[..., Run]) -> None:
    run = make_run(run={"updates": 12}, buffer={"max_staleness": 1, "capacity_groups": 8})
    execute(run)
    for policy_version, batch in enumerate(run.updates.batches):
        for group in batch:
            assert policy_version - group.oldest_version <= 1


def test_requests_have_evaluation_continuation_and_screening_priorities(
    make_run: Callable[..., Run],
) -> None:
    run = make_run(num_actors=1)
    execute(run)
    priorities = {request.priority for request in run.engines[0].requests}
    assert priorities == {0, 1, 2}


def test_first_and_last_version_are_evaluated_on_held_out_prompts(
    make_run: Callable[..., Run],
) -> None:
    run = make_run()
    finished = execute(run)
    evaluated = [e.values for e in run.sink.events if e.kind == "evaluation"]
    assert evaluated[0]["policy_version"] == 0
    assert evaluated[0]["newest_version"] == 0
    assert evaluated[-1]["policy_version"] == 5
    assert evaluated[-1]["oldest_version"] == 5
    assert finished.service_fields["accuracy_before"] is not None
    assert finished.service_fields["accuracy_after"] is not None


def test_run_of_no_updates_only_evaluates_the_model(make_run: Callable[..., Run]) -> None:
    run = make_run(run={"updates": 0})
    finished = execute(run)
    assert (finished.outcome, finished.progress.optimizer_updates) == ("completed", 0)
    summary = finished.service_fields
    accuracy = summary["accuracy_last"]
    assert isinstance(accuracy, float) and 0 <= accuracy <= 1
    assert summary["accuracy_after"] is None  # there was no update
    assert summary["prompts_screened"] == 0
    evaluations = [event for event in run.sink.events if event.kind == "evaluation"]
    assert [event.values["policy_version"] for event in evaluations] == [0]
    assert (run.updates.batches, run.updates.saved) == ([], [])  # no checkpoint


def test_verifier_failure_fails_only_its_group(
    make_run: Callable[..., Run],
) -> None:
    run = make_run()
    run.verifier.broken_prompts = {0, 2, 4, 6}
    finished = execute(run)
    assert finished.outcome == "completed"
    ledger = finished.service_fields["ledger"]
    assert isinstance(ledger, dict)
    assert ledger["failures"]["verifier"] >= 1
    assert ledger["closes"] is True


def test_stop_drains_saves_and_the_ledger_balances(make_run: Callable[..., Run]) -> None:
    run = make_run(run={"updates": 10_000})

    async def stopped() -> RunResult:
        loop = asyncio.get_running_loop()

        def stop_after_three(num_updates: int) -> None:
            if num_updates == 3:
                loop.call_soon_threadsafe(run.stop.set)

        run.updates = CountingUpdates(stop_after_three)
        return await run.execute()

    finished = asyncio.run(asyncio.wait_for(stopped(), 30))
    assert finished.outcome != "completed"
    assert finished.reason == "stopped by a signal"
    assert 3 <= finished.progress.policy_version <= 4
    assert run.updates.saved == [finished.progress.policy_version]
    ledger = finished.service_fields["ledger"]
    assert isinstance(ledger, dict)
    assert ledger["closes"] is True
    assert ledger["groups"]["in_flight"] == 0


def test_lease_in_scoring_is_ended_by_a_drain(
    make_run: Callable[..., Run],
) -> None:
    run = make_run(num_actors=1, run={"updates": 10_000})

    async def stopped() -> RunResult:
        async def score_forever() -> None:
            """After the third update, only the drain ends the scoring."""
            if len(run.updates.batches) >= 3:
                run.stop.set()
                await asyncio.Event().wait()

        run.verifier.on_score = score_forever
        return await run.execute()

    finished = asyncio.run(asyncio.wait_for(stopped(), 15))
    ledger = finished.service_fields["ledger"]
    assert isinstance(ledger, dict)
    assert ledger["groups"]["unfinished"] >= 1
    assert ledger["closes"] is True


def test_learner_failure_is_raised_in_the_actors(make_run: Callable[..., Run]) -> None:
    run = make_run()

    async def broken() -> None:
        hub = InProcessHub()
        feed = FeedPublisher("127.0.0.1", 0)
        store = MemoryStore()
        serving = asyncio.create_task(serve(StateMachine(run.service), hub, feed, []))
        acting = asyncio.create_task(run._act(hub, 1, store))  # pyright: ignore[reportPrivateUsage]
        link = hub.connect("learner")
        await link.send(run._hello("learner", 0))  # pyright: ignore[reportPrivateUsage]
        await link.send(m.TakeBatch(policy_version=0, num_groups=2))
        while not isinstance(await link.receive(10), m.BatchReady):
            pass  # a full batch shows that the actor is working
        await link.send(m.Failure(role="learner", message="learner: out of memory"))
        await serving
        with pytest.raises(RoleError, match="learner: out of memory"):
            await acting

    limited: Coroutine[Any, Any, None] = asyncio.wait_for(broken(), 30)
    asyncio.run(limited)


class ScriptedLink:
    """A link that receives a given list of messages."""

    def __init__(self, incoming: list[m.Message]) -> None:
        self._incoming = incoming

    async def send(self, message: m.Message) -> None:
        pass

    async def receive(self, deadline_s: float) -> m.Message:
        return self._incoming.pop(0)

    async def close(self) -> None:
        pass


def test_batch_received_during_weight_publication_is_trained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path), run={"updates": 1}, learner={"groups_per_update": 1})
    group = make_group(5, 3)
    no_members = m.WeightMembers(
        policy_version=0, epoch=1, actor_names=[], ranks_each=[], world_size=1
    )
    link = ScriptedLink(
        [
            m.Welcome(policy_version=0),
            m.MembershipChanged(reason="actor-2.0 joined", lost=[]),
            group,
            m.BatchReady(policy_version=0, lease_ids=[5]),
            no_members,
            no_members,
            m.JournalDurable(policy_version=1, service_sequence=3),
            m.Summary(fields={}),
        ]
    )
    updates = CountingUpdates()
    loop = LearnerLoop(
        config,
        link=link,
        trainer=updates,
        sender=MemorySender(MemoryStore(), bucket_bytes=1024),
        backend="gloo",
        stop=Stop(),
    )
    hello = m.Hello(role="learner", index=0, incarnation=0, fingerprint="f", process_id=1)
    finished = asyncio.run(asyncio.wait_for(loop.run(hello), 10))
    assert finished.outcome == "completed"
    assert [[g.lease_id for g in batch] for batch in updates.batches] == [[5]]


def test_batch_with_a_missing_group_raises(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path), run={"updates": 1}, learner={"groups_per_update": 1})
    link = ScriptedLink(
        [m.Welcome(policy_version=0), m.BatchReady(policy_version=0, lease_ids=[5])]
    )
    loop = LearnerLoop(
        config,
        link=link,
        trainer=CountingUpdates(),
        sender=MemorySender(MemoryStore(), bucket_bytes=1024),
        backend="gloo",
        stop=Stop(),
    )
    hello = m.Hello(role="learner", index=0, incarnation=0, fingerprint="f", process_id=1)
    with pytest.raises(RoleError, match=r"groups \[5\]"):
        asyncio.run(asyncio.wait_for(loop.run(hello), 10))


def test_hanging_verifier_does_not_block_the_drain(make_run: Callable[..., Run]) -> None:
    run = make_run(num_actors=1, run={"updates": 10_000})

    async def stopped() -> RunResult:
        async def hang() -> None:
            if len(run.updates.batches) >= 2:
                run.stop.set()
                await asyncio.Event().wait()

        run.verifier.on_score = hang
        return await run.execute()

    finished = asyncio.run(asyncio.wait_for(stopped(), 15))
    ledger = finished.service_fields["ledger"]
    assert isinstance(ledger, dict)
    assert ledger["closes"] is True


class BrokenStepper(ScriptedStepper):
    """Rejects every offered version and has no valid weights afterwards."""

    broken = False

    @property
    def has_valid_weights(self) -> bool:
        return not self.broken

    def load_weights(self, offer: WeightOffer) -> float:
        self.broken = True
        raise WeightSyncError(f"policy version {offer.policy_version} is refused")


class SlowLink:
    """A link whose send takes many event loop iterations, like one with a full outbox."""

    def __init__(self, link: InProcessLink) -> None:
        self._link = link

    async def send(self, message: m.Message) -> None:
        for _ in range(50):
            await asyncio.sleep(0)
        await self._link.send(message)

    async def receive(self, deadline_s: float) -> m.Message:
        return await self._link.receive(deadline_s)

    async def close(self) -> None:
        await self._link.close()


def test_actor_reports_a_rejected_version_before_it_exits(tmp_path: Path) -> None:
    """Its running leases fail at the same time and must not prevent the report."""
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path), actors={"slots": 4, "max_new_tokens": 90_000})
    task = DigitTask()
    offer = WeightOffer(
        policy_version=1,
        epoch=3,
        rank=1,
        world_size=2,
        store_host="h",
        store_port=1,
        backend="gloo",
        deadline_s=5.0,
    )

    def never_ends(request: GenerationRequest, num_started: int) -> list[int]:
        return [7] * 1_000_000

    def make_stepper() -> BrokenStepper:
        return BrokenStepper(
            never_ends, num_slots=4, context_length=1_000_000, receive=lambda offer: 0.0
        )

    async def run() -> list[m.Message]:
        hub = InProcessHub()
        async with SteppedEngine(ThreadWorker(make_stepper)) as engine:
            loop = ActorLoop(
                config,
                name="actor-1",
                link=SessionLink(SlowLink(hub.connect("actor-1.0"))),
                engine=engine,
                rollout=Rollout(config, engine, InlineVerifier(task), CharCodec()),
                task=task,
            )
            hello = m.Hello(role="actor", index=1, incarnation=0, fingerprint="f", process_id=1)
            acting = asyncio.create_task(loop.run(hello))
            hub.offer("actor-1.0", m.Welcome(policy_version=0))
            leases = m.Leases(
                lease_ids=[1, 2, 3], prompt_ids=[0, 1, 2], kind="training", num_samples=0
            )
            hub.offer("actor-1.0", leases)
            while engine.stats.num_running < 4:  # noqa: ASYNC110 - the engine has no event for it
                await asyncio.sleep(0)
            hub.offer("actor-1.0", m.OfferWeights(offer=offer))
            received: list[m.Message] = []
            while not received or not isinstance(received[-1], m.WeightsApplied):
                message = (await hub.receive(10))[1]
                if message.number:  # skips the session's control messages
                    received.append(message)
            with pytest.raises(WeightSyncError, match="policy version 1 is refused"):
                await acting
        return received

    received = asyncio.run(asyncio.wait_for(run(), 30))
    applied = received[-1]
    assert isinstance(applied, m.WeightsApplied)
    assert (applied.policy_version, applied.epoch, applied.usable) == (-1, 3, False)
    assert applied.error == "policy version 1 is refused"
    # No lease was reported as ended: all sampled tokens are still in flight.
    assert not any(isinstance(message, m.GroupFinished | m.LeaseFailed) for message in received)
    assert applied.counts.groups_in_flight == 3
    assert applied.counts.tokens_generated == applied.counts.tokens_in_flight > 0


def test_suites_are_evaluated_beside_training_and_at_the_end(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    suite = make_suite(tmp_path, "hard", samples=2, every=2)
    run = make_run(evaluate={"every": 2, "num_samples": 2, "suites": [suite]})
    result = execute(run)
    events: list[dict[str, Any]] = [
        event.values for event in run.sink.events if event.kind == "suite"
    ]
    versions = [event["requested_version"] for event in events]
    assert (versions[0], versions[-1]) == (0, 5) and set(versions) <= {0, 2, 4, 5}
    assert all(event["num_completions"] == 6 for event in events)
    assert all(event["oldest_version"] >= event["requested_version"] for event in events)
    fields: dict[str, Any] = result.service_fields
    assert fields["ledger"]["closes"] is True
    assert fields["suites"]["hard"]["last"]["policy_version"] == 5
    assert len(run.updates.batches) == 5
