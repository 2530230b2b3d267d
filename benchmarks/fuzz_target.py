"""A service under fire, in one process: the codec, the mute table, the journaled machine's core.

Strangers have new names all the time; an insider is an actor with leases that begins to lie. Frames
are taken in as the shell (buffer/server.py) takes them in from its hub.
"""

import random
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

from speed_async.buffer.curriculum.curriculum import UniformCurriculum
from speed_async.buffer.service import BufferService
from speed_async.buffer.state_machine import StateMachine
from speed_async.config.load import build_config
from speed_async.config.schema import Config
from speed_async.errors import ProtocolError
from speed_async.evaluation.plan import EvaluationPlan
from speed_async.transport import messages as m
from speed_async.transport.codec import decode
from speed_async.transport.muting import BlockedPeers
from speed_async.types import ActorCounts

FINGERPRINT = "f"
HONEST, LIAR = "actor-1.0", "actor-2.0"
LIES_EACH = 200
"""Frames of one insider before the next run."""


@cache
def _config(model: Path) -> Config:
    tree = {
        "model": {"path": str(model)},
        "task": {"name": "arithmetic"},
        "gate": {"n_init": 2, "n_cont": 2},
        "learner": {"groups_per_update": 2},
        "evaluate": {"every": 0},
        "cluster": {"actors": 2},
        "buffer": {"durability": "none"},
    }
    return build_config(tree)


class Target:
    """One run of two actors and a learner, with leases out and a group in the buffer."""

    def __init__(self, model: Path) -> None:
        service = BufferService(
            _config(model),
            curriculum=UniformCurriculum(100, np.random.default_rng(0)),
            evaluations=EvaluationPlan(num_prompts=1, num_samples=1, every=0),
            fingerprint=FINGERPRINT,
            started_s=0.0,
            vocab_size=64,
        )
        self.machine = StateMachine(service)
        self.muted = BlockedPeers()
        self.reasons: Counter[str] = Counter()
        self.num_taken_in = 0
        self._now_s = 0.0
        self._begin()

    def digest(self) -> str:
        """All that a stranger may not touch, as text. It may ask to join: see `num_known`."""
        service = self.machine.service
        life, members = service.lifecycle, service.membership
        ledger = life.ledger
        parts = (
            ledger.table(life.leases.num_training),
            ledger.by_actor(),
            sorted(ledger.failures.items()),
            [entry for name in (HONEST, LIAR) for entry in life.leases.of_holder(name)],
            [(len(life.buffer), life.buffer.num_bytes), sorted(life.in_training)],
            [members.actors[name] for name in sorted(members.actors)],
            (sorted(members.lost), members.learner),
            (service.policy_version, service.phase, service.ended, service.warning),
        )
        return repr(parts)

    def receive(self, peer: str, frames: list[bytes]) -> None:
        """As the hub and the shell do it: dropped, refused, or taken in."""
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
        self.num_taken_in += 1
        self._flush()

    def _flush(self) -> None:
        """Stands where the shell sends: what is said is counted and forgotten."""
        conversations, guard = self.machine.conversations, self.machine.service.validator
        for _, reply in conversations.replies:
            if isinstance(reply, m.Rejected):
                self.reasons[f"refused: {_kind(reply.reason)}"] += 1
            else:
                self.reasons[f"answered: {type(reply).__name__}"] += 1
        conversations.replies.clear()
        for peer in conversations.unsent:
            while (message := conversations.next_unsent(peer)) is not None:
                if isinstance(message, m.Rejected):
                    self.reasons[f"refused: {_kind(message.reason)}"] += 1
                conversations.queued_one(peer)
        conversations.unsent.clear()
        self.machine.events.clear()
        for peer in guard.to_mute:
            self.muted.add(peer.encode())
        guard.to_mute.clear()

    def _begin(self) -> None:
        counts = ActorCounts()
        for index, name in enumerate(("learner", HONEST, LIAR)):
            role = "actor" if index else "learner"
            self._say(
                name,
                m.Hello(
                    role=role, index=index, incarnation=0, fingerprint=FINGERPRINT, process_id=1
                ),
            )
        for name in (HONEST, LIAR):
            self._say(name, m.WantWork(num_prompts=3, counts=counts))

    def _say(self, peer: str, message: m.Message) -> None:
        self.machine.message(peer, message, self._now_s)
        self._flush()
        assert peer.encode() not in self.muted


class Strangers:
    """Ever new names, some of which come back."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._count = 0

    def next(self) -> str:
        self._count += 1
        if self._random.random() < 0.1:
            return f"stranger-{self._random.randrange(self._count)}"
        return f"stranger-{self._count}"


def books_close(target: Target) -> bool:
    """Whether each group is somewhere exactly once, whatever an insider said."""
    life = target.machine.service.lifecycle
    checks = life.ledger.checks(life.leases.num_training)
    return next(holds for name, holds in checks.items() if name.startswith("groups:"))


MARKS = (
    *("lost", "must be a map", "is missing field", "unknown field", "must be", "array frames"),
    *("declares", "must declare", " array: ", "not one-dimensional", "protocol version"),
    *(
        "unknown message type",
        "not valid msgpack",
        "does not begin",
        "the header has",
        "is not for the service",
    ),
    *("is the learner's to send", "say Hello first", "has no frames", "fingerprint", "failure of"),
    *(
        "cannot be",
        "valid peer name",
        "does not know this peer",
        "characters",
        "counts",
        "is invalid",
    ),
    *(
        "in flight than",
        "from the future",
        "newer than",
        "vocabulary",
        "not finite",
        "is none",
        "no lease",
    ),
)


def _kind(reason: str) -> str:
    """A reason without its particulars."""
    return next((mark.strip(": ") for mark in MARKS if mark in reason), reason[:40])
