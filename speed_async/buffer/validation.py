"""Which messages the service will not take, and what their senders are told.

A sender is told once: whoever is refused is muted, and an actor is lost with that. All roles give
up at a refusal, so one that goes on is broken or hostile.
"""

from collections.abc import Collection, Mapping
from typing import Protocol

from speed_async.buffer.leases import LeaseTable
from speed_async.buffer.membership import Membership
from speed_async.buffer.validation_rules import PayloadRules
from speed_async.errors import ProtocolError
from speed_async.transport import messages as m
from speed_async.transport.groups import GroupStats
from speed_async.transport.joining import Join
from speed_async.types import LeaseKind

MAX_KNOWN = 65536
"""Actors and supervisors that a run takes in, those that left included."""
MAX_AWAITED = 1024
MAX_AWAITED_A_KEY = 256
"""Joins whose actor has not said Hello yet."""


Result = m.GroupFinished | m.ScreenedOut | m.Evaluated
_LEASED_AS: dict[type[m.Message], LeaseKind] = {
    m.GroupFinished: LeaseKind.TRAINING,
    m.ScreenedOut: LeaseKind.TRAINING,
    m.Evaluated: LeaseKind.EVALUATION,
}


class LeaseLookup(Protocol):
    """Who works on what (buffer/lifecycle.py)."""

    @property
    def leases(self) -> LeaseTable: ...

    @property
    def in_training(self) -> Mapping[int, object]:
        """What the learner has to train, by lease."""
        ...


class MessageValidator:
    def __init__(
        self,
        membership: Membership,
        fingerprint: str,
        model_fingerprint: str,
        accepted: Collection[type[m.Message]],
        inspection: PayloadRules,
        books: LeaseLookup,
    ) -> None:
        self.num_refused = 0
        """Messages refused here."""
        self.num_malformed = 0
        """Messages that the hub refused, as the shell last said."""
        self.num_muted = 0
        """Peers that the hub does not listen to any more, likewise."""
        self.to_mute: list[str] = []
        """Peers for the shell to mute."""
        self.weighed: GroupStats | None = None
        """Of the last group that was let in: each long array is read once."""
        self._membership = membership
        self._fingerprint = fingerprint
        self._model_fingerprint = model_fingerprint
        self._accepted = accepted
        self._inspection = inspection
        self._books = books

    def knows(self, peer: str) -> bool:
        """Whether this peer takes part in the run."""
        membership = self._membership
        is_here = peer in membership.actors or peer == membership.learner
        return is_here or membership.admitted(peer)

    def refused(self, peer: str) -> None:
        """A message of this peer was refused; its next ones need not be read."""
        self.num_refused += 1
        self.to_mute.append(peer)

    def refusal(
        self,
        peer: str,
        message: m.Message,
        *,
        policy_version: int,
        newest_version: int,
        key: str = "",
    ) -> str | None:
        """Why `message` of `peer` is out of place, or None when it is welcome. Changes nothing but
        `weighed`."""
        kind = type(message).__name__
        if type(message) not in self._accepted:
            return f"{kind} is not for the service"
        if isinstance(message, m.Counted) and peer not in self._membership.actors:
            return self._lost(peer) or "unknown actor: say Hello first"
        open_to_all = isinstance(message, m.Counted | m.Hello | m.Failure | Join)
        if not open_to_all and peer != self._membership.learner:
            return f"{kind} is the learner's to send"
        if isinstance(message, m.Failure) and not self._speaks_for_itself(peer, message, key):
            return f"a failure of {message.role[:40]!r} is not for it to tell"
        if isinstance(message, Join) and message.has_rank:  # nothing is kept of it
            return self._no_rank(message.rank, key)
        if isinstance(message, m.Hello | Join) and self._membership.num_known >= MAX_KNOWN:
            return f"this run has seen {MAX_KNOWN} actors, and takes no more"
        if isinstance(message, Join) and (reason := self._too_many(key)):
            return reason
        if isinstance(message, m.Hello) and (reason := self._stranger(peer, message, key)):
            return reason
        if fault := self._inspection.fault(message, newest_version):
            return fault
        if isinstance(message, Result) and (misfit := self._misfit(peer, message)):
            return misfit
        if isinstance(message, m.GroupFinished):
            try:
                self.weighed = self._inspection.weigh(message, newest_version)
            except ProtocolError as error:
                return str(error)
        if isinstance(message, m.Trained) and message.policy_version > policy_version:
            unknown = [i for i in message.lease_ids if i not in self._books.in_training]
            if unknown:
                return f"Trained: lease {unknown[0]} is not in training"
        return None

    def _misfit(self, peer: str, result: Result) -> str | None:
        """Why this is no result of its lease; of a lease that has ended, lifecycle takes none."""
        lease = self._books.leases.held_by(peer, result.lease_id)
        if lease is None:
            return None
        if lease.kind is not _LEASED_AS[type(result)]:
            return f"{type(result).__name__}: lease {lease.lease_id} is for {lease.kind}"
        if isinstance(result, m.GroupFinished) and result.prompt_id != lease.prompt_id:
            prompts = f"prompt {lease.prompt_id}, not {result.prompt_id}"
            return f"GroupFinished: lease {lease.lease_id} is for {prompts}"
        return None

    def _speaks_for_itself(self, peer: str, failure: m.Failure, key: str) -> bool:
        """A failure ends the run, so it is believed of those who are here, and of a rank of this
        run before its first word."""
        if self.knows(peer):
            return True
        role = failure.role
        if not self._membership.is_rank(role) or peer.partition(".")[0] != role:
            return False
        index = role.removeprefix("actor-")
        owner = self._membership.belongs_to(int(index)) if index.isdecimal() else None
        return owner in (None, key)

    def _no_rank(self, rank: int, key: str) -> str | None:
        """Why a supervisor with this key has not this rank."""
        if not self._membership.is_rank(f"actor-{rank}"):
            return f"this run has no actor of rank {rank}"
        if self._membership.belongs_to(rank) not in (None, key):
            return f"actor-{rank} belongs to another key"
        return None

    def _too_many(self, key: str) -> str | None:
        """Why nobody more may join now."""
        for_key = self._membership.num_awaited(key) >= MAX_AWAITED_A_KEY
        if not for_key and self._membership.num_awaited() < MAX_AWAITED:
            return None
        of_whom = "of its key " if for_key and key else ""
        return f"too many actors {of_whom}joined and have not started yet: try again in a minute"

    def _stranger(self, peer: str, hello: m.Hello, key: str) -> str | None:
        if lost := self._lost(peer):
            return lost
        owner = self._membership.belongs_to(hello.index) if hello.role == "actor" else None
        if owner not in (None, key):
            return f"actor-{hello.index} belongs to another key"
        if hello.fingerprint != self._fingerprint:
            return (
                f"its task data (fingerprint {hello.fingerprint[:40]}) differ from the service's "
                f"({self._fingerprint}): give every node the same config and data files"
            )
        if hello.model_fingerprint != self._model_fingerprint:
            return (
                f"its model folder (fingerprint {hello.model_fingerprint[:40]}) differs from the "
                f"service's ({self._model_fingerprint}): give every node the same model, tokenizer "
                "and chat template"
            )
        learner = self._membership.learner
        if hello.role == "learner" and learner not in (None, peer):
            return f"the run has a learner ({learner})"
        return None

    def _lost(self, peer: str) -> str | None:
        reason = self._membership.lost.get(peer)
        return reason and f"this incarnation was given up as lost ({reason}): start a new one"
