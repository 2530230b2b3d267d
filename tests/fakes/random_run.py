"""A service whose learner and actors act at random."""

import random
from dataclasses import replace
from pathlib import Path

from speed_async.buffer.durability.recovery import begin_segment, open_machine
from speed_async.transport import messages as m
from speed_async.types import ActorCounts
from tests.fakes.buffer_fixtures import (
    FINGERPRINTS,
    builder,
    make_config,
    make_group,
    make_suite,
)
from tests.fakes.service_harness import evaluated, failed, screened_out, trained


class RandomRun:
    """A machine with its journal, a learner and two actors that step at random."""

    def __init__(self, folder: Path, seed: int, kind: str = "uniform") -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        self.config = make_config(
            str(folder),
            run={"updates": 1000},
            curriculum={"kind": kind},
            evaluate={
                "every": 2,
                "num_samples": 1,
                "suites": [make_suite(folder, "hard", every=3)],
            },
        )
        self.folder = folder / "journal"
        self.build = builder()
        self.machine, _ = open_machine(
            self.folder, self.config, self.build, **FINGERPRINTS, attempt=0
        )
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
            self.send(
                peer,
                m.Hello(role=role, index=index, incarnation=0, fingerprint="f", process_id=1),
            )

    def send(self, peer: str, message: m.Message) -> None:
        self.numbers[peer] = self.numbers.get(peer, 0) + 1
        numbered = replace(message, number=self.numbers[peer])
        self.machine.message(peer, numbered, self.now_s)
        self.receive()

    def receive(self) -> None:
        sessions = self.machine.sessions
        for peer in (*self.done, "learner"):
            while (answer := sessions.next_unsent(peer)) is not None:
                sessions.mark_queued(peer)
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

    def step(self) -> None:
        """Perform one random action."""
        self.now_s += self.rng.random()
        peer = self.rng.choice(list(self.done))
        match self.rng.randrange(7):
            case 0:
                self.send(peer, m.WantWork(num_prompts=4, counts=self.counts(peer)))
            case 1 | 2 | 3:
                self._report()
            case 4:
                self.machine.tick(self.now_s, 0.001)
                self.receive()
            case 5 if self.batch:
                self._train()
            case _:
                self.send("learner", m.TakeBatch(policy_version=self.version, num_groups=2))

    def _report(self) -> None:
        if not self.leases:
            return
        peer, lease, prompt, kind = self.leases.pop(self.rng.randrange(len(self.leases)))
        done = self.done[peer]
        done[0] += 1
        if kind == "evaluation":
            done[1] += 1
            self.send(peer, evaluated(lease, counts=self.counts(peer)))
            return
        match self.rng.randrange(3):
            case 0:
                done[1] += 12
                group = make_group(lease, prompt, version=self.version, counts=self.counts(peer))
                self.send(peer, group)
            case 1:
                done[1] += 6
                self.send(peer, replace(screened_out(lease), counts=self.counts(peer)))
            case _:
                self.send(peer, replace(failed(lease, "verifier"), counts=self.counts(peer)))

    def _train(self) -> None:
        self.version += 1
        self.trained[0] += len(self.batch)
        self.trained[1] += 12 * len(self.batch)
        self.send("learner", trained(self.version, self.batch, *self.trained))
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
            self.send(peer, applied)

    def crash(self) -> None:
        """Simulate SIGKILL: unwritten data is lost (none here, as before any reply)."""
        assert self.machine.journal is not None
        self.machine.journal.write()
        self.machine.journal.close()

    def snapshot(self) -> None:
        old = self.machine.journal
        assert old is not None
        old.write()
        self.machine.journal = begin_segment(
            self.folder, self.machine, old.segment + 1, old.sequence
        )
        old.close()
