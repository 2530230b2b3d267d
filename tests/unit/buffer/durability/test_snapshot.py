"""A machine restored from a snapshot continues exactly like the original."""

import random
from collections import deque
from collections.abc import Iterator
from copy import copy
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from speed_async.buffer.durability.journal import Journal, Place
from speed_async.buffer.durability.snapshot import capture, restore
from speed_async.buffer.service import BufferService
from speed_async.buffer.state import MachineState
from speed_async.buffer.state_machine import StateMachine
from speed_async.config.schema import Config
from speed_async.errors import JournalError
from speed_async.observability.metrics import Event
from speed_async.transport import messages as m
from speed_async.transport.codec import encode
from speed_async.transport.joining import Join, JoinAccepted, Leaving
from speed_async.types import ActorCounts
from tests.fakes.buffer_fixtures import make_config, make_group, make_suite, restored
from tests.fakes.service_harness import evaluated, failed, screened_out, trained

CONSTANT = {
    "Evidence.max_reward_ranges",
    "Ledger.ends",  # its tallies are compared one by one
    "RunStatistics.started_s",
    "RunStatistics.truncation",  # its counts are compared one by one
    "WindowedMean.num_values",
    "WindowedRate.start_s",
    "WindowedRate.window_s",
    "ServiceState.evaluations",  # the states of its suites are compared one by one
    "ServiceState.ended",  # nothing follows it but another attempt, which resets it
}
"""Fields with the same value in every state of one run."""
ACTIONS = {
    "want": 24,
    "result": 80,
    "take": 16,
    "train": 16,
    "tick": 16,
    "publish": 8,
    "published": 8,
    "applied": 12,
    "report": 3,
    "join": 3,
    "leave": 1,
    "return_": 2,
    "disconnect": 1,
    "refuse": 1,
    "checkpoint": 2,
    "stranger": 2,
    "stop": 1,
    "restart": 1,
}


class MemoryJournal(Journal):
    """Counts records without writing them."""

    def __init__(self) -> None:
        self.sequence = 0

    def append(self, *args: object, **kwargs: object) -> Place:
        self.sequence += 1
        return (1, self.sequence)


class Comparison:
    """A machine and its restored copy, which receive the same random inputs."""

    def __init__(self, folder: Path, seed: int, kind: str) -> None:
        (folder / "config.json").write_text("{}")
        config = make_config(
            str(folder),
            run={"updates": 1000, "stop_at_accuracy": 0.01, "overlap": seed % 2 == 0},
            curriculum={"kind": kind},
            evaluate={
                "every": 2,
                "num_samples": 32,
                "suites": [make_suite(folder, "hard", every=1, samples=2)],
            },
            buffer={"max_staleness": 3, "lease_timeout_s": 20.0},
        )
        small = config.buffer.model_copy(update={"capacity_bytes": 1000})
        self.config: Config = config.model_copy(update={"buffer": small})
        self.machine = self.build(None)
        self.machine.journal = MemoryJournal()
        self.copy = self.restored_copy()
        self.rng = random.Random(seed)
        self.now_s = 1.0
        self.numbers: dict[str, int] = {}
        self.received: dict[str, int] = {}
        self.actors = {"actor-1": 0, "actor-2": 0}  # incarnations
        self.leases: list[tuple[str, m.Leases, int]] = []
        self.batch: list[int] = []
        self.version = self.epoch = 0
        self.tokens: dict[str, int] = {}
        self.last_trained = trained(0, [], 0, 0)
        self.rejected: set[str] = set()
        self.supervisors: list[str] = []
        self.joined: list[int] = []  # indices of actors to enter
        self.changed: set[str] = set()
        self.hello("learner")
        for actor in self.actors:
            self.hello(actor)

    def build(self, state: MachineState | None) -> StateMachine:
        service = BufferService(
            self.config,
            num_prompts=200,
            num_held_out=3,
            suite_sizes={"hard": 2},
            fingerprint="f",
            started_s=0.5,
            state=None if state is None else state.service,
        )
        return StateMachine(service, state)

    def restored_copy(self) -> StateMachine:
        restored_machine = self.build(restored(self.machine.state))
        restored_machine.journal = copy(self.machine.journal)
        refused = self.machine.service.validator.num_refused  # counted from the process's start
        restored_machine.service.validator.num_refused = refused
        return restored_machine

    def compare(self) -> None:
        """Compare both states, and continue with a new copy."""
        assert capture(self.copy.state) == capture(self.machine.state)
        self.copy = self.restored_copy()
        assert capture(self.copy.state) == capture(self.machine.state)
        assert list(values(self.copy.state)) == list(values(self.machine.state))
        initial = dict(values(self.build(None).state))
        for name, value in values(self.machine.state):
            if name not in initial or value != initial[name]:
                self.changed.add(name)

    def input(self, name: str, *args: object) -> list[tuple[str, m.Message]]:
        """Pass an input to both machines; returns the messages that they send."""
        for machine in (self.machine, self.copy):
            getattr(machine, name)(*args)
        peers = ["learner", *self.supervisors]
        for actor, last in self.actors.items():
            peers += [f"{actor}.{incarnation}" for incarnation in range(last + 1)]
        sent = outputs(self.machine, peers)
        of_copy = outputs(self.copy, peers)
        assert len(of_copy) == len(sent)
        for one, other in zip(of_copy, sent, strict=True):
            assert comparable(one) == comparable(other)
        messages = [entry for entry in sent if not isinstance(entry, Event)]
        for peer, message in messages:
            self.receive(peer, message)
        return messages

    def receive(self, peer: str, message: m.Message) -> None:
        self.received[peer] = max(self.received.get(peer, 0), message.number)
        if isinstance(message, m.Leases):
            self.leases += [(peer, message, at) for at in range(len(message.lease_ids))]
        elif isinstance(message, m.BatchReady):
            self.batch = message.lease_ids
        elif isinstance(message, m.WeightMembers):
            self.epoch = message.epoch
        elif isinstance(message, JoinAccepted):
            self.joined.append(message.index)
        elif isinstance(message, m.Rejected):
            self.rejected.add(peer)

    def send(self, peer: str, message: m.Message) -> None:
        """Send a message unless the peer was rejected, after which it stops."""
        if peer in self.rejected:
            return
        self.numbers[peer] = self.numbers.get(peer, 0) + 1
        received = self.received.get(peer, 0) if self.rng.random() < 0.7 else 0
        numbered = replace(message, number=self.numbers[peer], received=received)
        self.input("message", peer, numbered, self.now_s, "key")

    def hello(self, role: str) -> None:
        incarnation = self.actors.get(role, 0)
        kind, _, index = role.partition("-")
        peer = f"{role}.{incarnation}" if index else role
        hello = m.Hello(
            role=kind, index=int(index or 0), incarnation=incarnation, fingerprint="f", process_id=1
        )
        self.send(peer, hello)

    def counts(self, peer: str) -> ActorCounts:
        self.tokens[peer] = self.tokens.get(peer, 0) + self.rng.randrange(20)
        held = sum(lease[0] == peer for lease in self.leases)
        return ActorCounts(
            groups_leased=held + 1,
            groups_in_flight=held,
            groups_continuing=held // 2,
            completions_generated=self.tokens[peer] // 2,
            tokens_generated=self.tokens[peer],
            tokens_in_flight=min(2 * held, self.tokens[peer]),
        )

    # --- actions -----------------------------------------------------------------------------

    def act(self) -> None:
        self.now_s += self.rng.random()
        [action] = self.rng.choices(list(ACTIONS), list(ACTIONS.values()))
        actor = self.rng.choice(list(self.actors))
        peer = f"{actor}.{self.actors[actor]}"
        if peer in self.rejected:
            action = "return_"
        counts = self.counts(peer)
        match action:
            case "want":
                self.send(peer, m.WantWork(num_prompts=self.rng.randrange(8), counts=counts))
            case "result":
                if self.leases:
                    self.report_result(*self.leases.pop(self.rng.randrange(len(self.leases))))
            case "take":
                self.send("learner", m.TakeBatch(policy_version=self.version, num_groups=2))
            case "train":
                self.train()
            case "tick":
                lag_s = self.rng.choice([0.001, 3.0])
                self.now_s += self.rng.choice([0.5] * 9 + [15.0])
                self.input("tick", self.now_s, lag_s)
            case "publish" | "published":
                self.publish(started=action == "publish", missing=peer)
            case "applied":
                self.send(peer, self.applied(counts))
            case "report":
                gauges = {"slots_busy": 3, "num_slots": 4.0, "sampling_s": self.now_s}
                self.send(peer, m.ActorReport(gauges=gauges, counts=counts))
            case "join":
                join = Join(machine="there", process_id=1)
                self.supervisors.append(f"join-{len(self.supervisors)}")
                self.input("message", self.supervisors[-1], join, self.now_s, "other key")
            case "leave":
                goodbye = self.rng.random() < 0.5
                self.send(peer, m.Goodbye(counts=counts) if goodbye else Leaving(counts=counts))
            case "return_":
                self.actors[actor] += 1
                self.hello(actor)
            case "disconnect":
                self.input("gone", peer, self.now_s)
            case "refuse":
                self.input("refused", peer, "malformed", self.now_s)
            case "checkpoint":
                oldest = max(0, self.version - 3)
                saved = m.CheckpointSaved(policy_version=self.version, oldest_kept_version=oldest)
                self.send("learner", saved)
            case "stranger":
                self.enter(self.joined.pop() if self.joined else 30)
            case "stop":
                self.send("learner", m.StopAsked())
            case _:
                self.restart()

    def enter(self, index: int) -> None:
        """The first message of an actor that is not a rank."""
        hello = m.Hello(role="actor", index=index, incarnation=0, fingerprint="f", process_id=1)
        self.input("message", f"actor-{index}.0", hello, self.now_s, "other key")

    def report_result(self, peer: str, leases: m.Leases, at: int) -> None:
        lease, prompt, counts = leases.lease_ids[at], leases.prompt_ids[at], self.counts(peer)
        outcome = self.rng.randrange(9)
        if outcome < 3:
            reasons = ("verifier: broken", f"{m.UNUSABLE}: too long", m.DRAINED, m.STALE)
            self.send(peer, replace(failed(lease, self.rng.choice(reasons)), counts=counts))
        elif leases.kind == "evaluation":
            result = evaluated(lease, num_completions=leases.num_samples, counts=counts)
            self.send(peer, replace(result, newest_version=self.version))
        elif outcome < 8:
            rewards = [float(self.rng.random() < 0.5) for _ in range(4)]
            version = max(0, self.version - self.rng.randrange(3))
            group = make_group(lease, prompt, rewards=rewards, version=version, counts=counts)
            self.send(peer, group)
        else:
            result = screened_out(lease, num_passed=1, num_truncated=2)
            self.send(peer, replace(result, num_truncated_passed=1, counts=counts))

    def train(self) -> None:
        if self.batch:
            self.version += 1
            message = trained(self.version, self.batch, 2 * self.version, 24 * self.version)
            skipped, grad_norm = self.rng.random() < 0.3, self.rng.choice([0, 0.5])
            metrics = {"loss": 1, "grad_norm": grad_norm, "time/wait_s": 2, "time/train_s": 0.5}
            self.last_trained = replace(message, metrics=metrics, skipped=skipped)
            self.send("learner", self.last_trained)
            self.batch = []

    def publish(self, *, started: bool, missing: str) -> None:
        if started:
            publish = m.PublishWeights(
                policy_version=self.version,
                store_host="h",
                store_port=1,
                backend="gloo",
                deadline_s=5.0,
            )
            self.send("learner", publish)
            return
        failed_ = self.rng.random() < 0.3
        published = m.WeightsPublished(
            policy_version=self.version,
            epoch=self.epoch,
            transfer_s=1.5,
            num_bytes=100,
            error="timeout" if failed_ else "",
            missing=[missing] if failed_ else [],
        )
        self.send("learner", published)

    def applied(self, counts: ActorCounts) -> m.WeightsApplied:
        is_failure = self.rng.random() < 0.3
        return m.WeightsApplied(
            policy_version=-1 if is_failure else self.version,
            epoch=self.epoch,
            pause_s=0.25,
            transfer_s=1.0,
            error="no memory" if is_failure else "",
            usable=self.rng.random() < 0.7,
            counts=counts,
        )

    def restart(self) -> None:
        """Another attempt, in which the learner repeats an update."""
        attempt = self.machine.state.service.attempt + 1
        self.input("begin_attempt", attempt, self.now_s)
        self.numbers.clear()
        self.received.clear()
        self.leases.clear()
        self.batch = []
        self.hello("learner")
        for actor in self.actors:
            self.actors[actor] += 1
            self.hello(actor)
        before = self.version - 1
        if self.rng.random() < 0.3:
            self.resume_ahead()
        elif self.machine.service.lifecycle.groups.lineage.after(before):
            self.send("learner", m.TakeBatch(policy_version=before, num_groups=2))
            self.send("learner", self.last_trained)
            self.batch = []

    def resume_ahead(self) -> None:
        """The learner's checkpoint is ahead of the journal."""
        self.version += 1
        resumed = m.Resumed(
            policy_version=self.version,
            service_sequence=0,
            groups_trained=2 * self.version,
            completions_trained=8 * self.version,
            tokens_trained=24 * self.version,
            recent_lease_ids=self.last_trained.lease_ids,
        )
        self.send("learner", resumed)

    def finish(self) -> None:
        """End the run, with its summary."""
        self.restart()
        for actor, incarnation in self.actors.items():
            peer = f"{actor}.{incarnation}"
            self.send(peer, m.WantWork(num_prompts=8, counts=self.counts(peer)))
        evaluate = self.rng.random() < 0.5
        finish = m.FinishRun(policy_version=self.version, evaluate=evaluate, reason="completed")
        self.send("learner", finish)
        self.compare()
        for _ in range(60):  # more than cluster.stall_timeout_s
            self.now_s += 25.0
            self.input("tick", self.now_s, 0.0)
            self.compare()
            if self.machine.service.ended:
                return
        raise AssertionError("the run did not end")


def outputs(machine: StateMachine, peers: list[str]) -> list[Event | tuple[str, m.Message]]:
    """Everything that the machine emits, with the messages of these sessions."""
    emitted: list[Event | tuple[str, m.Message]] = [*machine.take_output().events]
    emitted += machine.sessions.replies
    machine.sessions.replies.clear()
    machine.sessions.unsent.clear()
    for peer in peers:
        while (message := machine.sessions.next_unsent(peer)) is not None:
            machine.sessions.mark_queued(peer)
            emitted.append((peer, message))
    return emitted


def comparable(output: Event | tuple[str, m.Message]) -> object:
    if isinstance(output, Event):
        return repr(output)
    peer, message = output
    is_wire = type(message).__module__.startswith("speed_async.transport.")
    return peer, encode(message) if is_wire else repr(message)


def values(state: object) -> Iterator[tuple[str, object]]:
    """Class, name and comparable value of every field in a state."""
    if is_dataclass(state) and not isinstance(state, m.Message):
        for field in fields(state):
            name = f"{type(state).__name__}.{field.name}"
            if name != "BufferedGroup.message":  # it is in the journal
                value = getattr(state, field.name)
                if not is_dataclass(value) or isinstance(value, m.Message):
                    yield name, plain(value)
                yield from values(value)
    elif isinstance(state, dict | list | tuple | deque):
        for each in state.values() if isinstance(state, dict) else state:
            yield from values(each)


def plain(value: object) -> object:
    """A value that can be compared; fields of nested records are compared one by one."""
    match value:
        case np.ndarray():
            return value.dtype, value.tobytes()
        case np.random.Generator():
            return value.bit_generator.state
        case dict():
            return type(value), [(key, plain(each)) for key, each in value.items()]
        case list() | tuple():
            return type(value), list(map(plain, value))
        case deque():
            return value.maxlen, list(map(plain, value))
        case m.Message():
            return repr(value)
        case _:
            return type(value) if is_dataclass(value) else (type(value), value)


@pytest.mark.filterwarnings("error:Pydantic")
@pytest.mark.parametrize("kind", ["uniform", "posterior"])
def test_restored_machine_continues_like_the_original(tmp_path: Path, kind: str) -> None:
    changed: set[str] = set()
    all_fields: set[str] = set()
    for seed in range(3):
        comparison = Comparison(tmp_path, seed, kind)
        for _ in range(12):
            for _ in range(40):
                comparison.act()
            comparison.compare()
        comparison.finish()
        changed |= comparison.changed
        all_fields |= {name for name, _ in values(comparison.machine.state)}
    assert sorted(all_fields - changed - CONSTANT) == []


def tree(folder: Path) -> dict[str, object]:
    """The state of a new machine as it is saved."""
    packed = capture(Comparison(folder, 0, "uniform").machine.state)
    return msgpack.unpackb(packed, strict_map_key=False)


@pytest.mark.parametrize("name", ["last_s", "service.warnings.texts", "service.attempt"])
def test_snapshot_without_a_field_is_refused(tmp_path: Path, name: str) -> None:
    saved = tree(tmp_path)
    section: Any = saved
    *path, last = name.split(".")
    for key in path:
        section = section[key]
    del section[last]
    with pytest.raises(JournalError, match=rf"does not fit this release: .*{name}"):
        restore(MachineState, msgpack.packb(saved))


def test_snapshot_with_an_unknown_field_or_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="only one of them has mood"):
        restore(MachineState, msgpack.packb(tree(tmp_path) | {"mood": 1}))
    with pytest.raises(JournalError, match="last_s: Input should be a valid number"):
        restore(MachineState, msgpack.packb(tree(tmp_path) | {"last_s": "late"}))


@pytest.mark.filterwarnings("ignore:Pydantic")
def test_value_that_is_not_state_cannot_be_captured(tmp_path: Path) -> None:
    machine = Comparison(tmp_path, 0, "uniform").machine
    machine.state.service.warnings.texts = {"a": object()}  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="object is not service state"):
        capture(machine.state)
