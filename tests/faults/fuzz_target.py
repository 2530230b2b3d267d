"""A service under attack in one process: codec, mute table, and the journaled state machine.

Unknown peers use new names all the time. The faulty actor has leases and sends invalid
messages. Frames are processed as the server (buffer/server.py) processes them from its hub.
"""

import random
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from speed_async.buffer.service import BufferService
from speed_async.buffer.state_machine import StateMachine
from speed_async.config.load import build_config
from speed_async.config.schema import Config
from speed_async.errors import ProtocolError
from speed_async.transport import messages as m
from speed_async.transport.codec import decode
from speed_async.transport.muting import BlockedPeers
from speed_async.types import ActorCounts
from tests.fakes.buffer_fixtures import make_suite

FINGERPRINT = "f"
CORRECT_ACTOR, FAULTY_ACTOR = "actor-1.0", "actor-2.0"
FRAMES_PER_FAULTY_ACTOR = 200
"""Number of frames from one faulty actor before the next run."""


@cache
def _config(model: Path) -> Config:
    tree: dict[str, Any] = {
        "algorithm": "speed-rloo",
        "model": {"path": str(model)},
        "task": {"name": "arithmetic"},
        "gate": {"n_init": 2, "n_cont": 2},
        "learner": {"groups_per_update": 2},
        "evaluate": {"every": 0, "suites": [make_suite(model, "hard", samples=2)]},
        "cluster": {"actors": 2},
        "buffer": {"durability": "none"},
    }
    return build_config(tree)


class Target:
    """One run of two actors and a learner, with open leases and a group in the buffer."""

    def __init__(self, model: Path) -> None:
        service = BufferService(
            _config(model),
            num_prompts=100,
            num_held_out=1,
            suite_sizes={"hard": 1},
            fingerprint=FINGERPRINT,
            started_s=0.0,
            vocab_size=64,
        )
        self.machine = StateMachine(service)
        self.muted = BlockedPeers()
        self.reasons: Counter[str] = Counter()
        self.num_delivered = 0
        self._now_s = 0.0
        self._begin()

    def digest(self) -> str:
        """State that an unknown peer must not change, as text. Joining is allowed (`num_known`)."""
        service = self.machine.service
        lifecycle, members = service.lifecycle, service.membership
        ledger = lifecycle.ledger
        parts = (
            ledger.table(lifecycle.leases.num_training),
            ledger.by_actor(),
            sorted(ledger.failures.items()),
            [
                entry
                for name in (CORRECT_ACTOR, FAULTY_ACTOR)
                for entry in lifecycle.leases.of_holder(name)
            ],
            [
                (len(lifecycle.groups.buffer), lifecycle.groups.buffer.num_bytes),
                sorted(lifecycle.groups.in_training),
            ],
            [members.actors[name] for name in sorted(members.actors)],
            (sorted(members.lost), members.learner),
            (service.policy_version, service.state.phase, service.ended, service.warning),
        )
        return repr(parts)

    def receive(self, peer: str, frames: list[bytes]) -> None:
        """Process frames like the hub and the server: drop, refuse or accept them."""
        name = peer.encode()
        if name in self.muted:
            self.reasons["dropped unread: its peer is muted"] += 1
            return
        try:
            message = decode(frames)
        except ProtocolError as error:
            self.reasons[f"malformed: {_kind(str(error))}"] += 1
            self.muted.add(name)
            return
        self._now_s += 1e-6
        self.machine.message(peer, message, self._now_s)
        self.num_delivered += 1
        self._flush()

    def is_muted(self, peer: str) -> bool:
        return peer.encode() in self.muted

    def _flush(self) -> None:
        """Stands in for the server's send loop: counts and discards outgoing messages."""
        sessions, guard = self.machine.sessions, self.machine.service.validator
        for _, reply in sessions.replies:
            if isinstance(reply, m.Rejected):
                self.reasons[f"refused: {_kind(reply.reason)}"] += 1
            else:
                self.reasons[f"answered: {type(reply).__name__}"] += 1
        sessions.replies.clear()
        for peer in sessions.unsent:
            while (message := sessions.next_unsent(peer)) is not None:
                if isinstance(message, m.Rejected):
                    self.reasons[f"refused: {_kind(message.reason)}"] += 1
                sessions.mark_queued(peer)
        sessions.unsent.clear()
        self.machine.take_output()
        for peer in guard.to_block:
            self.muted.add(peer.encode())
        guard.to_block.clear()

    def _begin(self) -> None:
        counts = ActorCounts()
        for index, name in enumerate(("learner", CORRECT_ACTOR, FAULTY_ACTOR)):
            role = "actor" if index else "learner"
            self._send(
                name,
                m.Hello(
                    role=role, index=index, incarnation=0, fingerprint=FINGERPRINT, process_id=1
                ),
            )
        for name in (CORRECT_ACTOR, FAULTY_ACTOR):
            self._send(name, m.WantWork(num_prompts=3, counts=counts))
        before = ""
        while (state := self.digest()) != before:  # until all that can be granted is granted
            before = state
            self.machine.tick(self._now_s, 0.0)
            self._flush()

    def _send(self, peer: str, message: m.Message) -> None:
        self.machine.message(peer, message, self._now_s)
        self._flush()
        assert not self.is_muted(peer)


class UnknownPeers:
    """A stream of new names, some of which repeat."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._count = 0

    def next(self) -> str:
        self._count += 1
        if self._random.random() < 0.1:
            return f"unknown-{self._random.randrange(self._count)}"
        return f"unknown-{self._count}"


def groups_balance(target: Target) -> bool:
    """Whether each group is accounted for exactly once, whatever the faulty actor sent."""
    lifecycle = target.machine.service.lifecycle
    checks = lifecycle.ledger.checks(lifecycle.leases.num_training)
    return next(holds for name, holds in checks.items() if name.startswith("groups:"))


MARKS = (
    "lost",
    "must be a map",
    "is missing field",
    "unknown field",
    "must be",
    "array frames",
    "declares",
    "must declare",
    " array: ",
    "not one-dimensional",
    "protocol version",
    "unknown message type",
    "not valid msgpack",
    "does not begin",
    "the header has",
    "is not for the service",
    "is accepted from the learner only",
    "send Hello first",
    "has no frames",
    "fingerprint",
    "failure of",
    "out of range",
    "valid peer name",
    "does not know this peer",
    "characters",
    "counts",
    "is invalid",
    "in flight than",
    "from the future",
    "newer than",
    "vocabulary",
    "not finite",
    "is not one of",
    "no lease",
)
"""Parts of error messages, by which errors are counted. The first match counts."""


def _kind(reason: str) -> str:
    """The reason without its details."""
    return next((mark.strip(": ") for mark in MARKS if mark in reason), reason[:40])
