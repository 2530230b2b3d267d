"""A service that died is had again from its journal, to the last byte of its state."""

import random
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from buffer_fixtures import make_config, make_group, posterior
from hypothesis import given, settings
from hypothesis import strategies as st
from service_harness import evaluated, failed, screened_out, trained

from speed_async.buffer.curriculum.curriculum import UniformCurriculum
from speed_async.buffer.durability.journal import segments
from speed_async.buffer.durability.recovery import begin_segment, open_machine
from speed_async.buffer.durability.snapshot import capture, restore
from speed_async.buffer.service import BufferService
from speed_async.buffer.state_machine import StateMachine
from speed_async.config.schema import Config
from speed_async.errors import JournalRefused
from speed_async.evaluation.plan import EvaluationPlan
from speed_async.transport import messages as m
from speed_async.types import ActorCounts


def builder(kind: str = "uniform"):
    def build(config: Config) -> BufferService:
        rng = np.random.default_rng(0)
        return BufferService(
            config,
            curriculum=UniformCurriculum(100, rng) if kind == "uniform" else posterior(100),
            evaluations=EvaluationPlan(num_prompts=3, num_samples=1, every=2),
            fingerprint="f",
            started_s=0.0,
        )

    return build


class Play:
    """A machine with its journal, a learner and two actors that do what they may, at random."""

    def __init__(self, folder: Path, seed: int, kind: str = "uniform") -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        self.config = make_config(str(folder), run={"updates": 1000})
        self.folder = folder / "journal"
        self.build = builder(kind)
        self.machine, _ = open_machine(self.folder, self.config, self.build, life=0)
        self.rng = random.Random(seed)
        self.now_s = 1.0
        self.numbers: dict[str, int] = {}
        self.leases: list[tuple[str, int, int, str]] = []
        self.batch: list[int] = []
        self.version = 0
        self.trained = [0, 0]
        self.done = {"actor-1.0": [0, 0], "actor-2.0": [0, 0]}
        for peer, role, index in (
            ("learner", "learner", 0),
            ("actor-1.0", "actor", 1),
            ("actor-2.0", "actor", 2),
        ):
            self.say(
                peer,
                m.Hello(role=role, index=index, incarnation=0, fingerprint="f", process_id=1),
            )

    def say(self, peer: str, message: m.Message) -> None:
        self.numbers[peer] = self.numbers.get(peer, 0) + 1
        numbered = replace(message, number=self.numbers[peer])
        self.machine.message(peer, numbered, self.now_s)
        self.hear()

    def hear(self) -> None:
        conversations = self.machine.conversations
        for peer in (*self.done, "learner"):
            while (answer := conversations.next_unsent(peer)) is not None:
                conversations.queued_one(peer)
                if isinstance(answer, m.Leases):
                    self.leases += [
                        (peer, lease, prompt, answer.kind)
                        for lease, prompt in zip(answer.lease_ids, answer.prompt_ids, strict=True)
                    ]
                elif isinstance(answer, m.BatchReady):
                    self.batch = answer.lease_ids

    def counts(self, peer: str) -> ActorCounts:
        leased, tokens = self.done[peer]
        held = sum(lease[0] == peer for lease in self.leases)
        return ActorCounts(
            groups_leased=leased + held, groups_in_flight=held, tokens_generated=tokens
        )

    def act(self) -> None:
        """One thing that may happen."""
        self.now_s += self.rng.random()
        peer = self.rng.choice(list(self.done))
        match self.rng.randrange(7):
            case 0:
                self.say(peer, m.WantWork(num_prompts=4, counts=self.counts(peer)))
            case 1 | 2 | 3:
                self._report()
            case 4:
                self.machine.tick(self.now_s, 0.001)
                self.hear()
            case 5 if self.batch:
                self._train()
            case _:
                self.say("learner", m.TakeBatch(policy_version=self.version, num_groups=2))

    def _report(self) -> None:
        if not self.leases:
            return
        peer, lease, prompt, kind = self.leases.pop(self.rng.randrange(len(self.leases)))
        done = self.done[peer]
        done[0] += 1
        if kind == "evaluation":
            done[1] += 1
            self.say(peer, evaluated(lease, counts=self.counts(peer)))
            return
        match self.rng.randrange(3):
            case 0:
                done[1] += 12
                group = make_group(lease, prompt, version=self.version, counts=self.counts(peer))
                self.say(peer, group)
            case 1:
                done[1] += 6
                self.say(peer, replace(screened_out(lease), counts=self.counts(peer)))
            case _:
                self.say(peer, replace(failed(lease, "verifier"), counts=self.counts(peer)))

    def _train(self) -> None:
        self.version += 1
        self.trained[0] += len(self.batch)
        self.trained[1] += 12 * len(self.batch)
        self.say("learner", trained(self.version, self.batch, *self.trained))
        self.batch = []
        for peer in self.done:
            applied = m.WeightsApplied(
                policy_version=self.version,
                epoch=0,
                pause_s=0.0,
                transfer_s=0.0,
                error="",
                counts=self.counts(peer),
            )
            self.say(peer, applied)

    def die(self) -> None:
        """SIGKILL: what was not written is gone (here: all was, as before any answer)."""
        assert self.machine.journal is not None
        self.machine.journal.write()
        self.machine.journal.close()

    def snapshot(self) -> None:
        old = self.machine.journal
        assert old is not None
        old.write()
        self.machine.journal = begin_segment(self.folder, self.machine, old.segment + 1)
        old.close()


def state(machine: StateMachine) -> object:
    machine.conversations.rewind_all()  # what left the sockets is the shell's to know
    return msgpack.unpackb(capture(machine), strict_map_key=False)


def difference(one: object, other: object, where: str = "") -> str:
    """Where two states differ first; empty when they do not."""
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
@given(seed=st.integers(0, 2**32), num_acts=st.integers(0, 120), snapshot_at=st.integers(0, 120))
def test_replaying_the_journal_gives_the_very_same_service(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    seed: int,
    num_acts: int,
    snapshot_at: int,
) -> None:
    play = Play(tmp_path_factory.mktemp("run"), seed, kind)
    for number in range(num_acts):
        play.act()
        if number == snapshot_at:
            play.snapshot()
    play.die()
    again, notes = open_machine(play.folder, play.config, play.build, life=0)
    assert notes == []
    assert difference(state(again), state(play.machine)) == ""
    assert all(
        again.service.lifecycle.ledger.checks(again.service.lifecycle.leases.num_training).values()
    )


def test_time_goes_on_from_the_run_s_own_start(tmp_path: Path) -> None:
    """Each process has a start of its own; the run's is that of the first."""
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path))

    def begun(at_s: float) -> BufferService:
        service = builder()(config)
        service.started_s = at_s
        return service

    first, _ = open_machine(tmp_path / "journal", config, lambda _: begun(0.5), life=0)
    first.tick(2.0, 0.0)
    assert first.journal is not None
    first.journal.write()
    first.journal.close()
    again, _ = open_machine(tmp_path / "journal", config, lambda _: begun(1000.0), life=0)
    assert again.service.started_s == 0.5


def test_a_snapshot_fills_a_new_machine(tmp_path: Path) -> None:
    play = Play(tmp_path, 3, "posterior")
    for _ in range(150):
        play.act()
    fresh = StateMachine(play.build(play.config))
    restore(fresh, capture(play.machine))
    assert state(fresh) == state(play.machine)


def test_another_life_returns_untrained_groups_and_loses_every_actor(tmp_path: Path) -> None:
    play = Play(tmp_path, 5)
    while not play.batch:
        play.act()
    taken = list(play.batch)
    play.die()
    again, _ = open_machine(play.folder, play.config, play.build, life=1)
    lifecycle = again.service.lifecycle
    assert again.service.membership.present() == ()
    assert lifecycle.leases.num_training == 0
    assert {group.lease_id for group, _ in lifecycle.buffer.waiting()} >= set(taken)
    assert all(lifecycle.ledger.checks(0).values())


def test_a_learner_that_comes_back_is_given_the_same_batches_again(tmp_path: Path) -> None:
    play = Play(tmp_path, 5)
    batches = []
    while play.version < 3:
        if play.batch and (not batches or batches[-1] != play.batch):
            batches.append(list(play.batch))
        play.act()
    play.die()
    again, _ = open_machine(play.folder, play.config, play.build, life=1)
    offered = []
    hello = m.Hello(role="learner", index=0, incarnation=1, fingerprint="f", process_id=1)
    again.message("learner", hello, play.now_s)
    before = again.service.lifecycle.ledger.table(0)
    for version in range(3):
        again.message("learner", m.TakeBatch(policy_version=version, num_groups=2), play.now_s)
        while (answer := again.conversations.next_unsent("learner")) is not None:
            again.conversations.queued_one("learner")
            if isinstance(answer, m.BatchReady):
                offered.append(answer.lease_ids)
        again.message("learner", trained(version + 1, offered[-1], 0, 0), play.now_s)
    assert offered == batches[:3]
    assert again.service.policy_version == 3
    assert again.service.lifecycle.ledger.table(0) == before
    assert (
        again.service.lifecycle.lineage.num_repeated_alike
        == again.service.lifecycle.lineage.num_repeated
        == 3
    )


def test_a_damaged_tail_is_cut_and_told_and_the_books_still_close(tmp_path: Path) -> None:
    play = Play(tmp_path, 8)
    for _ in range(200):
        play.act()
    play.die()
    path = play.folder / f"{segments(play.folder)[-1]:08d}.journal"
    path.write_bytes(path.read_bytes()[:-100])
    again, notes = open_machine(play.folder, play.config, play.build, life=1)
    [note] = notes
    assert "tail was damaged" in note
    assert all(again.service.lifecycle.ledger.checks(0).values())


def test_a_checkpoint_ahead_of_a_cut_journal_is_followed(tmp_path: Path) -> None:
    play = Play(tmp_path, 8)
    while play.version < 2:
        play.act()
    play.die()
    again, _ = open_machine(play.folder, play.config, play.build, life=1)
    hello = m.Hello(role="learner", index=0, incarnation=1, fingerprint="f", process_id=1)
    again.message("learner", hello, play.now_s)
    resumed = m.Resumed(
        policy_version=4,
        service_sequence=10**6,
        groups_trained=8,
        completions_trained=32,
        tokens_trained=96,
        recent_lease_ids=[1000, 1001, 1002, 1003],
        notice="",
    )
    again.message("learner", resumed, play.now_s)
    lifecycle = again.service.lifecycle
    assert again.service.policy_version == 4
    assert lifecycle.ledger.ends["trained"].groups == 8
    assert all(lifecycle.ledger.checks(0).values())
    entry = lifecycle.leases.grant("x", 1, "training")  # type: ignore[arg-type]
    assert entry.lease.lease_id > 1003


def test_a_learner_without_a_checkpoint_cannot_go_back_past_what_the_journal_holds(
    tmp_path: Path,
) -> None:
    play = Play(tmp_path, 8)
    while play.version < 3:
        play.act()
    play.say("learner", m.CheckpointSaved(policy_version=3, oldest_kept_version=2))
    play.die()
    again, _ = open_machine(play.folder, play.config, play.build, life=1)
    hello = m.Hello(role="learner", index=0, incarnation=1, fingerprint="f", process_id=1)
    again.message("learner", replace(hello, number=1), play.now_s)
    resumed = m.Resumed(
        policy_version=0,
        service_sequence=0,
        groups_trained=0,
        completions_trained=0,
        tokens_trained=0,
        recent_lease_ids=[],
        notice="version-000003 is damaged",
    )
    again.message("learner", replace(resumed, number=2), play.now_s)
    said = []
    while (message := again.conversations.next_unsent("learner")) is not None:
        again.conversations.queued_one("learner")
        said.append(message)
    assert isinstance(said[-1], m.Abort)
    assert said[-1].role == "buffer service"
    assert said[-1].message == (
        "version-000003 is damaged; no checkpoint is left to resume from, and the journal no "
        "longer holds the updates from the start to 3: restore a checkpoint from a backup into "
        "the run's checkpoints/, or start a new run"
    )
    assert again.service.ended
    assert again.service.policy_version == 3  # nothing was thrown away


def test_a_damaged_beginning_falls_back_to_the_segment_before(tmp_path: Path) -> None:
    play = Play(tmp_path, 9)
    for _ in range(60):
        play.act()
    expected = capture(play.machine)
    play.snapshot()
    play.die()
    newest = segments(play.folder)[-1]
    path = play.folder / f"{newest:08d}.journal"
    path.write_bytes(path.read_bytes()[:-1])
    again, notes = open_machine(play.folder, play.config, play.build, life=0)
    assert any("damaged at its beginning" in note for note in notes)
    rebuilt = StateMachine(play.build(play.config))
    restore(rebuilt, expected)
    assert state(again) == state(rebuilt)


def test_settings_may_change_over_a_resume(tmp_path: Path) -> None:
    play = Play(tmp_path, 4)
    for _ in range(80):
        play.act()
    play.die()
    buffer = play.config.buffer.model_copy(update={"capacity_groups": 99})
    config = play.config.model_copy(update={"buffer": buffer})
    again, _ = open_machine(play.folder, config, play.build, life=0)
    assert again.service.config.buffer.capacity_groups == 99
    assert again.service.policy_version == play.machine.service.policy_version
    assert again.service.lifecycle.ledger.table(0) == play.machine.service.lifecycle.ledger.table(0)


# --- what is whole and does not fit ------------------------------------------------------------


def ended_play(tmp_path: Path) -> tuple[Play, dict[str, bytes]]:
    """A machine that died, and the bytes of its journal."""
    play = Play(tmp_path, 8)
    for _ in range(60):
        play.act()
    play.snapshot()
    for _ in range(60):
        play.act()
    play.die()
    return play, {path.name: path.read_bytes() for path in play.folder.iterdir()}


def assert_refused(play: Play, before: dict[str, bytes], said: str, build=None) -> None:
    with pytest.raises(JournalRefused) as caught:
        open_machine(play.folder, play.config, build or play.build, life=1)
    assert said in str(caught.value)
    assert "Nothing in it was changed" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in play.folder.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "kind"), [("fingerprint", "data"), ("model_fingerprint", "model")]
)
def test_a_journal_of_other_data_or_another_model_is_refused(
    tmp_path: Path, name: str, kind: str
) -> None:
    play, before = ended_play(tmp_path)

    def build(config: Config) -> BufferService:
        service = play.build(config)
        setattr(service, name, "other")
        return service

    assert_refused(play, before, f"was written with another {kind} (fingerprint ", build)


def test_a_journal_of_another_protocol_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play, before = ended_play(tmp_path)
    monkeypatch.setattr("speed_async.buffer.durability.opened.PROTOCOL_VERSION", 99)
    assert_refused(play, before, "was written by another release (it has protocol version")


def test_a_journal_in_another_format_is_refused_and_not_taken_for_damage(tmp_path: Path) -> None:
    play, before = ended_play(tmp_path)
    [*_, newest] = sorted(before)
    before[newest] = b"saj1" + before[newest][4:]
    (play.folder / newest).write_bytes(before[newest])
    assert_refused(play, before, "it has format saj1")


def test_a_record_that_cannot_be_replayed_refuses_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of this release: it must not cost what another one would recover."""
    play, before = ended_play(tmp_path)

    def broken(service: BufferService, *_: object) -> None:
        raise KeyError("peer")

    monkeypatch.setattr(BufferService, "tick", broken)
    assert_refused(play, before, "cannot go on from it (KeyError: 'peer')")


def test_a_snapshot_that_does_not_fit_refuses_the_journal(tmp_path: Path) -> None:
    play, before = ended_play(tmp_path)
    assert_refused(play, before, "snapshot does not fit", builder("posterior"))


def test_settings_that_do_not_fit_refuse_the_journal(tmp_path: Path) -> None:
    play, before = ended_play(tmp_path)

    run = play.config.run.model_copy(update={"updates": 7})
    play.config = play.config.model_copy(update={"run": run})

    def build(config: Config) -> BufferService:
        return builder("posterior" if config == play.config else "uniform")(config)

    assert_refused(play, before, "snapshot does not fit", build)


def test_a_torn_tail_is_cut_only_once_the_rest_was_taken_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play, before = ended_play(tmp_path)
    [*_, newest] = sorted(before)
    before[newest] = before[newest].rstrip(b"\0")[:-3]
    (play.folder / newest).write_bytes(before[newest])
    with monkeypatch.context() as patch:
        patch.setattr("speed_async.buffer.durability.opened.PROTOCOL_VERSION", 99)
        assert_refused(play, before, "another release")
    _, [note] = open_machine(play.folder, play.config, play.build, life=1)
    assert "tail was damaged" in note


def test_paths_of_the_time_of_the_journal_need_not_be_there_any_more(tmp_path: Path) -> None:
    play, _ = ended_play(tmp_path)
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "config.json").rename(moved / "config.json")
    model = play.config.model.model_copy(update={"path": str(moved)})
    (tmp_path / "journal").rename(moved / "journal")
    config = play.config.model_copy(update={"model": model})
    again, notes = open_machine(moved / "journal", config, play.build, life=0)
    assert notes == []
    assert again.service.config == config
    assert again.service.policy_version == play.machine.service.policy_version
