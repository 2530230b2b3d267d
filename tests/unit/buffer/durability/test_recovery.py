"""A crashed service is recovered from its journal with exactly the same state."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_async.buffer.durability.journal import segments
from speed_async.buffer.durability.recovery import Build, open_machine
from speed_async.buffer.durability.snapshot import capture, restore
from speed_async.buffer.service import BufferService
from speed_async.buffer.state import MachineState, ServiceState
from speed_async.buffer.state_machine import StateMachine
from speed_async.config.schema import Config
from speed_async.errors import JournalRefused
from speed_async.launcher.roles.service_role import make_sinks
from speed_async.observability.metrics import Event
from speed_async.observability.sinks import JsonlSink, read_events
from speed_async.transport import messages as m
from speed_async.types import GroupEnd
from tests.fakes.buffer_fixtures import FINGERPRINTS, builder, make_config
from tests.fakes.random_run import RandomRun
from tests.fakes.service_harness import trained


def state(machine: StateMachine) -> object:
    """What a recovery restores: not what was sent, nor when each peer was last heard."""
    machine.sessions.rewind_all()
    machine.service.membership.restart_timeouts(machine.last_s)
    return msgpack.unpackb(capture(machine.state), strict_map_key=False)


def rebuilt(run: RandomRun, snapshot: bytes) -> StateMachine:
    """A machine with the state of this snapshot."""
    restored = restore(MachineState, snapshot)
    return StateMachine(run.build(run.config, restored.service), restored)


def difference(one: object, other: object, where: str = "") -> str:
    """The first difference between two states. Empty if they are equal."""
    if isinstance(one, dict) and isinstance(other, dict) and set(one) == set(other):
        parts = (difference(one[key], other[key], f"{where}.{key}") for key in one)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        parts = (difference(a, b, f"{where}[{i}]") for i, (a, b) in pairs)
    else:
        return "" if one == other else f"{where}: {one!r} is not {other!r}"
    return next(filter(None, parts), "")


@pytest.mark.parametrize("kind", ["uniform", "posterior"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), num_steps=st.integers(0, 120), snapshot_at=st.integers(0, 120))
def test_replaying_the_journal_restores_the_same_state(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    seed: int,
    num_steps: int,
    snapshot_at: int,
) -> None:
    run = RandomRun(tmp_path_factory.mktemp("run"), seed, kind)
    for number in range(num_steps):
        run.step()
        if number == snapshot_at:
            run.snapshot()
    run.crash()
    recovered, notes = open_machine(run.folder, run.config, run.build, **FINGERPRINTS, attempt=0)
    assert notes == []
    assert difference(state(recovered), state(run.machine)) == ""
    lifecycle = recovered.service.lifecycle
    assert all(lifecycle.ledger.checks(lifecycle.leases.num_training).values())


def test_time_continues_from_the_start_of_the_run(tmp_path: Path) -> None:
    """The start time of the run is that of its first process."""
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path))

    first, _ = open_machine(
        tmp_path / "journal", config, builder(started_s=0.5), **FINGERPRINTS, attempt=0
    )
    first.tick(2.0, 0.0)
    assert first.journal is not None
    first.journal.write()
    first.journal.close()
    recovered, _ = open_machine(
        tmp_path / "journal", config, builder(started_s=1000.0), **FINGERPRINTS, attempt=0
    )
    assert recovered.service.present_status(2.0).values["wall_s"] == 1.5


def test_peers_have_their_whole_timeout_to_reconnect_to_a_restarted_service(
    tmp_path: Path,
) -> None:
    run = RandomRun(tmp_path, 5)
    while not run.machine.service.membership.present():
        run.step()
    almost_s = 0.9 * run.config.cluster.peer_timeout_s

    def names_after_tick(machine: StateMachine, seconds: float) -> list[str]:
        machine.tick(machine.last_s + seconds, 0.0)
        return [actor.name for actor in machine.service.membership.present()]

    before = names_after_tick(run.machine, almost_s)
    run.crash()
    recovered, _ = open_machine(run.folder, run.config, run.build, **FINGERPRINTS, attempt=0)
    assert names_after_tick(recovered, almost_s) == before != []
    assert names_after_tick(recovered, almost_s) == []


def test_events_that_a_killed_service_did_not_store_are_stored_after_its_recovery(
    tmp_path: Path,
) -> None:
    run = RandomRun(tmp_path, 5)
    while run.version < 5:
        run.step()
    events = [event for event in run.machine.take_output().events if event.kind != "status"]
    stored, lost = events[:-2], events[-2:]
    sink = JsonlSink(tmp_path)
    for event in stored:
        sink.write(event)
    sink.close()
    run.crash()
    settings = run.config.model_copy(
        update={"run": run.config.run.model_copy(update={"updates": 9})}
    )
    replayed: list[Event] = []
    open_machine(
        run.folder, settings, run.build, **FINGERPRINTS, attempt=0, replayed=replayed.extend
    )
    for one in make_sinks(settings, tmp_path, replayed):
        one.close()
    assert read_events(tmp_path / "metrics.jsonl") == [*stored, *lost]
    assert {"step", "evaluation"} <= {event.kind for event in stored}


def test_a_snapshot_restores_a_new_machine(tmp_path: Path) -> None:
    run = RandomRun(tmp_path, 3, "posterior")
    for _ in range(150):
        run.step()
    assert state(rebuilt(run, capture(run.machine.state))) == state(run.machine)


def test_a_new_attempt_returns_untrained_groups_and_removes_all_actors(tmp_path: Path) -> None:
    run = RandomRun(tmp_path, 5)
    while not run.batch:
        run.step()
    taken = list(run.batch)
    run.crash()
    recovered, _ = open_machine(run.folder, run.config, run.build, **FINGERPRINTS, attempt=1)
    lifecycle = recovered.service.lifecycle
    assert recovered.service.membership.present() == ()
    assert lifecycle.leases.num_training == 0
    assert {group.lease_id for group in lifecycle.groups.buffer.waiting()} >= set(taken)
    assert all(lifecycle.ledger.checks(0).values())


def test_a_restarted_learner_receives_the_same_batches_again(tmp_path: Path) -> None:
    run = RandomRun(tmp_path, 5)
    batches = []
    while run.version < 3:
        if run.batch and (not batches or batches[-1] != run.batch):
            batches.append(list(run.batch))
        run.step()
    run.crash()
    recovered, _ = open_machine(run.folder, run.config, run.build, **FINGERPRINTS, attempt=1)
    offered = []
    hello = m.Hello(role="learner", index=0, incarnation=1, fingerprint="f", process_id=1)
    recovered.message("learner", hello, run.now_s)
    before = recovered.service.lifecycle.ledger.table(0)
    for version in range(3):
        recovered.message("learner", m.TakeBatch(policy_version=version, num_groups=2), run.now_s)
        while (answer := recovered.sessions.next_unsent("learner")) is not None:
            recovered.sessions.mark_queued("learner")
            if isinstance(answer, m.BatchReady):
                offered.append(answer.lease_ids)
        recovered.message("learner", trained(version + 1, offered[-1], 0, 0), run.now_s)
    assert offered == batches[:3]
    assert recovered.service.policy_version == 3
    assert recovered.service.lifecycle.ledger.table(0) == before
    assert (
        recovered.service.lifecycle.groups.lineage.num_repeated_identical
        == recovered.service.lifecycle.groups.lineage.num_repeated
        == 3
    )


def test_a_damaged_tail_is_cut_and_reported_and_the_ledger_balances(tmp_path: Path) -> None:
    run = RandomRun(tmp_path, 8)
    for _ in range(200):
        run.step()
    run.crash()
    path = run.folder / f"{segments(run.folder)[-1]:08d}.journal"
    path.write_bytes(path.read_bytes()[:-100])
    recovered, notes = open_machine(run.folder, run.config, run.build, **FINGERPRINTS, attempt=1)
    [note] = notes
    assert "tail was damaged" in note
    assert all(recovered.service.lifecycle.ledger.checks(0).values())


def test_a_checkpoint_ahead_of_a_cut_journal_takes_precedence(tmp_path: Path) -> None:
    run = RandomRun(tmp_path, 8)
    while run.version < 2:
        run.step()
    run.crash()
    recovered, _ = open_machine(run.folder, run.config, run.build, **FINGERPRINTS, attempt=1)
    hello = m.Hello(role="learner", index=0, incarnation=1, fingerprint="f", process_id=1)
    recovered.message("learner", hello, run.now_s)
    resumed = m.Resumed(
        policy_version=4,
        service_sequence=10**6,
        groups_trained=8,
        completions_trained=32,
        tokens_trained=96,
        recent_lease_ids=[1000, 1001, 1002, 1003],
        notice="",
    )
    recovered.message("learner", resumed, run.now_s)
    lifecycle = recovered.service.lifecycle
    assert recovered.service.policy_version == 4
    assert lifecycle.ledger.ends[GroupEnd.TRAINED].groups == 8
    assert all(lifecycle.ledger.checks(0).values())
    entry = lifecycle.leases.grant("x", 1)
    assert entry.lease.lease_id > 1003


def test_a_learner_without_a_checkpoint_cannot_go_back_before_the_journal(
    tmp_path: Path,
) -> None:
    run = RandomRun(tmp_path, 8)
    while run.version < 3:
        run.step()
    run.send("learner", m.CheckpointSaved(policy_version=3, oldest_kept_version=2))
    run.crash()
    recovered, _ = open_machine(run.folder, run.config, run.build, **FINGERPRINTS, attempt=1)
    hello = m.Hello(role="learner", index=0, incarnation=1, fingerprint="f", process_id=1)
    recovered.message("learner", replace(hello, number=1), run.now_s)
    resumed = m.Resumed(
        policy_version=0,
        service_sequence=0,
        groups_trained=0,
        completions_trained=0,
        tokens_trained=0,
        recent_lease_ids=[],
        notice="version-000003 is damaged",
    )
    recovered.message("learner", replace(resumed, number=2), run.now_s)
    received = []
    while (message := recovered.sessions.next_unsent("learner")) is not None:
        recovered.sessions.mark_queued("learner")
        received.append(message)
    assert isinstance(received[-1], m.Abort)
    assert received[-1].role == "buffer service"
    assert received[-1].message == (
        "version-000003 is damaged; no checkpoint is left to resume from, and the journal no "
        "longer holds the updates from the start to 3: restore a checkpoint from a backup into "
        "the run's checkpoints/, or start a new run"
    )
    assert recovered.service.ended
    assert recovered.service.policy_version == 3  # nothing was discarded


def test_a_damaged_beginning_falls_back_to_the_previous_segment(tmp_path: Path) -> None:
    run = RandomRun(tmp_path, 9)
    for _ in range(60):
        run.step()
    expected = capture(run.machine.state)
    run.snapshot()
    run.crash()
    newest = segments(run.folder)[-1]
    path = run.folder / f"{newest:08d}.journal"
    path.write_bytes(path.read_bytes()[:-1])
    recovered, notes = open_machine(run.folder, run.config, run.build, **FINGERPRINTS, attempt=0)
    assert any("damaged at its beginning" in note for note in notes)
    assert state(recovered) == state(rebuilt(run, expected))


def test_settings_may_change_between_attempts(tmp_path: Path) -> None:
    run = RandomRun(tmp_path, 4)
    for _ in range(80):
        run.step()
    run.crash()
    buffer = run.config.buffer.model_copy(update={"capacity_groups": 99})
    config = run.config.model_copy(update={"buffer": buffer})
    recovered, _ = open_machine(run.folder, config, run.build, **FINGERPRINTS, attempt=0)
    assert recovered.service.config.buffer.capacity_groups == 99
    assert recovered.service.policy_version == run.machine.service.policy_version
    before = run.machine.service.lifecycle.ledger.table(0)
    assert recovered.service.lifecycle.ledger.table(0) == before


# --- intact journals that do not match ---------------------------------------------------------


def crashed_run(tmp_path: Path, kind: str = "uniform") -> tuple[RandomRun, dict[str, bytes]]:
    """A crashed machine, and the bytes of its journal."""
    run = RandomRun(tmp_path, 8, kind)
    for _ in range(60):
        run.step()
    run.snapshot()
    for _ in range(60):
        run.step()
    run.crash()
    return run, {path.name: path.read_bytes() for path in run.folder.iterdir()}


def assert_refused(
    run: RandomRun, before: dict[str, bytes], expected: str, build=None, **changed: str
) -> None:
    fingerprints: dict[str, Any] = {**FINGERPRINTS, **changed}
    with pytest.raises(JournalRefused) as caught:
        open_machine(run.folder, run.config, build or run.build, **fingerprints, attempt=1)
    assert expected in str(caught.value)
    assert "Nothing in it was changed" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


@pytest.mark.parametrize("kind", ["data", "model"])
def test_a_journal_of_other_data_or_another_model_is_refused(tmp_path: Path, kind: str) -> None:
    run, before = crashed_run(tmp_path)
    expected = f"was written with another {kind} (fingerprint "
    assert_refused(run, before, expected, **{kind: "other"})


@pytest.mark.parametrize("kind", ["protocol", "snapshot"])
def test_a_journal_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run, before = crashed_run(tmp_path)
    name = f"speed_async.buffer.durability.recovery.{kind.upper()}_VERSION"
    monkeypatch.setattr(name, 99)
    assert_refused(run, before, f"was written by another release (it has {kind} version")


def test_a_journal_in_another_format_is_refused_and_not_treated_as_damaged(tmp_path: Path) -> None:
    run, before = crashed_run(tmp_path)
    [*_, newest] = sorted(before)
    before[newest] = b"saj1" + before[newest][4:]
    (run.folder / newest).write_bytes(before[newest])
    assert_refused(run, before, "it has format saj1")


def test_a_record_that_cannot_be_replayed_refuses_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of this release must not drop a journal that another release could recover."""
    run, before = crashed_run(tmp_path)

    def broken(service: BufferService, *_: object) -> None:
        raise KeyError("peer")

    monkeypatch.setattr(BufferService, "tick", broken)
    assert_refused(run, before, "cannot recover from it (KeyError: 'peer')")


@pytest.mark.parametrize("kind", ["uniform", "posterior"])
def test_a_snapshot_of_another_curriculum_refuses_the_journal(tmp_path: Path, kind: str) -> None:
    run, before = crashed_run(tmp_path, kind)
    other = "posterior" if kind == "uniform" else "uniform"
    assert_refused(run, before, "snapshot does not fit", with_curriculum(run.build, other))


def test_a_snapshot_of_another_number_of_prompts_refuses_the_journal(tmp_path: Path) -> None:
    run, before = crashed_run(tmp_path, "posterior")
    assert_refused(run, before, "100 prompts, expected 99", builder(99))


def with_curriculum(build: Build, kind: str) -> Build:
    """Build the service with this curriculum instead of the configured one."""

    def build_other(config: Config, state: ServiceState | None) -> BufferService:
        section = config.curriculum.model_copy(update={"kind": kind})
        return build(config.model_copy(update={"curriculum": section}), state)

    return build_other


def test_settings_that_do_not_match_refuse_the_journal(tmp_path: Path) -> None:
    run, before = crashed_run(tmp_path)

    section = run.config.run.model_copy(update={"updates": 7})
    run.config = run.config.model_copy(update={"run": section})

    def build(config: Config, state: ServiceState | None) -> BufferService:
        changed = with_curriculum(run.build, "posterior")
        return (changed if config == run.config else run.build)(config, state)

    assert_refused(run, before, "snapshot does not fit", build)


def test_a_torn_tail_is_cut_only_after_the_rest_was_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, before = crashed_run(tmp_path)
    [*_, newest] = sorted(before)
    before[newest] = before[newest].rstrip(b"\0")[:-3]
    (run.folder / newest).write_bytes(before[newest])
    with monkeypatch.context() as patch:
        patch.setattr("speed_async.buffer.durability.recovery.PROTOCOL_VERSION", 99)
        assert_refused(run, before, "another release")
    _, [note] = open_machine(run.folder, run.config, run.build, **FINGERPRINTS, attempt=1)
    assert "tail was damaged" in note


def test_recorded_paths_need_not_exist_any_more(tmp_path: Path) -> None:
    run, _ = crashed_run(tmp_path)
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "config.json").rename(moved / "config.json")
    model = run.config.model.model_copy(update={"path": str(moved)})
    (tmp_path / "journal").rename(moved / "journal")
    config = run.config.model_copy(update={"model": model})
    recovered, notes = open_machine(moved / "journal", config, run.build, **FINGERPRINTS, attempt=0)
    assert notes == []
    assert recovered.service.config == config
    assert recovered.service.policy_version == run.machine.service.policy_version
