"""Messages that the service refuses, and the reasons that it sends.

A peer receives one Rejected message and is then blocked; an actor is declared lost. Every role
exits when it is refused, so a peer that continues is faulty or hostile.
"""

from collections.abc import Collection
from dataclasses import dataclass

from speed_async.buffer.components import Components
from speed_async.buffer.validation_rules import PayloadRules
from speed_async.errors import ProtocolError
from speed_async.transport import messages as m
from speed_async.transport.groups import GroupStats
from speed_async.transport.joining import Join
from speed_async.types import LeaseKind

MAX_KNOWN = 65536
"""Actors and supervisors that a run admits, including those that left."""
MAX_PENDING_JOINS = 1024
MAX_PENDING_JOINS_PER_KEY = 256
"""Joins whose actor has not sent Hello."""
MAX_REASON_CHARS = 500


Result = m.GroupFinished | m.ScreenedOut | m.Evaluated
_LEASED_AS: dict[type[m.Message], LeaseKind] = {
    m.GroupFinished: LeaseKind.TRAINING,
    m.ScreenedOut: LeaseKind.TRAINING,
    m.Evaluated: LeaseKind.EVALUATION,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """Result of the validation of a message."""

    refusal: str = ""
    """Why the message is refused; empty if it is valid."""
    group: GroupStats | None = None
    """Statistics of a valid group, so that its arrays are read only once; None for any other
    message."""


class MessageValidator:
    def __init__(
        self,
        components: Components,
        fingerprint: str,
        model_fingerprint: str,
        accepted: Collection[type[m.Message]],
        rules: PayloadRules,
    ) -> None:
        self.num_refused = 0
        """Messages refused here."""
        self.num_malformed = 0
        """Messages refused by the hub; the server updates it."""
        self.num_blocked = 0
        """Peers blocked by the hub; the server updates it."""
        self.to_block: list[str] = []
        """Peers for the server to block."""
        self._membership = components.membership
        self._weight_group = components.weight_group
        self._fingerprint = fingerprint
        self._model_fingerprint = model_fingerprint
        self._accepted = accepted
        self._rules = rules
        self._lifecycle = components.lifecycle

    def is_member(self, peer: str) -> bool:
        """Whether this peer is a member of the run."""
        membership = self._membership
        is_present = peer in membership.actors or peer == membership.learner
        return is_present or membership.has_joined(peer)

    def refuse(self, peer: str, reason: str) -> m.Rejected:
        """Count a refused message and block its sender. Returns the reply."""
        self.refused(peer)
        return m.Rejected(reason=reason[:MAX_REASON_CHARS])

    def refused(self, peer: str) -> None:
        """Count a refused message and block its sender."""
        self.num_refused += 1
        self.to_block.append(peer)

    def check(self, peer: str, message: m.Message, key: str) -> Checked:
        """Check a message of `peer`, which has this public key. Changes nothing."""
        newest_version = self._newest_version
        refusal = self._refusal(peer, message, newest_version, key)
        if refusal is not None:
            return Checked(refusal=refusal)
        if not isinstance(message, m.GroupFinished):
            return Checked()
        try:
            return Checked(group=self._rules.check_group(message, newest_version))
        except ProtocolError as error:
            return Checked(refusal=str(error))

    @property
    def _newest_version(self) -> int:
        """Newest version that was trained or of which a broadcast has started."""
        return max(self._lifecycle.groups.policy_version, self._weight_group.newest_version)

    def _refusal(self, peer: str, message: m.Message, newest_version: int, key: str) -> str | None:
        """Why the message is refused, apart from the contents of a group; None if it is valid."""
        if isinstance(message, m.Counted):
            refusal = self._counted_refusal(peer, message)
        else:
            refusal = self._other_refusal(peer, message, key)
        if refusal or (refusal := self._rules.fault(message, newest_version)):
            return refusal
        if isinstance(message, Result):
            return self._lease_mismatch(peer, message)
        is_trained = isinstance(message, m.Trained)
        if is_trained and message.policy_version > self._lifecycle.groups.policy_version:
            unknown = [i for i in message.lease_ids if i not in self._lifecycle.groups.in_training]
            if unknown:
                return f"Trained: lease {unknown[0]} is not in training"
        return None

    def _counted_refusal(self, peer: str, message: m.Counted) -> str | None:
        """Why a message that only actors send is refused, whatever it contains."""
        if type(message) not in self._accepted:
            return f"{type(message).__name__} is not for the service"
        if peer not in self._membership.actors:
            return self._lost_reason(peer) or "unknown actor: send Hello first"
        return None

    def _other_refusal(self, peer: str, message: m.Message, key: str) -> str | None:
        """Why a message of no actor is refused, whatever numbers it contains."""
        if isinstance(message, m.Hello) and (reason := self._membership.index_conflict(message)):
            return reason
        kind = type(message).__name__
        if type(message) not in self._accepted:
            return f"{kind} is not for the service"
        open_to_all = isinstance(message, m.Hello | m.Failure | m.ActorExited | Join)
        if not open_to_all and peer != self._membership.learner:
            return f"{kind} is accepted from the learner only"
        is_report = isinstance(message, m.Failure | m.ActorExited)
        if is_report and not self._may_report(peer, message.role, key):
            return f"this peer may not report a failure of {message.role[:40]!r}"
        if isinstance(message, Join) and message.has_rank:  # leaves no state
            return self._check_rank(message.rank, key)
        if isinstance(message, m.Hello | Join) and self._membership.num_known >= MAX_KNOWN:
            return f"this run has admitted {MAX_KNOWN} actors, the maximum"
        if isinstance(message, Join) and (reason := self._check_pending_joins(key)):
            return reason
        if isinstance(message, m.Hello):
            return self._check_hello(peer, message, key)
        return None

    def _lease_mismatch(self, peer: str, result: Result) -> str | None:
        """Why this result does not match its lease. The lifecycle ignores results of ended
        leases."""
        lease = self._lifecycle.leases.held_by(peer, result.lease_id)
        if lease is None:
            return None
        if lease.kind is not _LEASED_AS[type(result)]:
            return f"{type(result).__name__}: lease {lease.lease_id} is for {lease.kind}"
        if isinstance(result, m.Evaluated) and result.num_completions != lease.num_samples:
            return (
                f"Evaluated: num_completions = {result.num_completions}, but a prompt of "
                f"{lease.suite} has {lease.num_samples}"
            )
        if isinstance(result, m.GroupFinished) and result.prompt_id != lease.prompt_id:
            prompts = f"prompt {lease.prompt_id}, not {result.prompt_id}"
            return f"GroupFinished: lease {lease.lease_id} is for {prompts}"
        return None

    def _may_report(self, peer: str, role: str, key: str) -> bool:
        """Whether this peer may report a failure of this role, which may end the run. Members may,
        and so may a rank of this run before its first message."""
        if self.is_member(peer):
            return True
        if not self._membership.is_rank(role) or peer.partition(".")[0] != role:
            return False
        index = role.removeprefix("actor-")
        owner = self._membership.key_of(int(index)) if index.isdecimal() else None
        return owner in (None, key)

    def _check_rank(self, rank: int, key: str) -> str | None:
        """Why a supervisor with this key may not use this rank; None if it may."""
        if not self._membership.is_rank(f"actor-{rank}"):
            return f"this run has no actor of rank {rank}"
        if self._membership.key_of(rank) not in (None, key):
            return f"actor-{rank} belongs to another key"
        return None

    def _check_pending_joins(self, key: str) -> str | None:
        """Why a supervisor with this key may not join now; None if it may."""
        limited_by_key = self._membership.num_pending(key) >= MAX_PENDING_JOINS_PER_KEY
        if not limited_by_key and self._membership.num_pending() < MAX_PENDING_JOINS:
            return None
        which = "with this key " if limited_by_key and key else ""
        return f"too many actors {which}joined and have not started yet: try again in a minute"

    def _check_hello(self, peer: str, hello: m.Hello, key: str) -> str | None:
        if lost_reason := self._lost_reason(peer):
            return lost_reason
        owner = self._membership.key_of(hello.index) if hello.role == "actor" else None
        if owner not in (None, key):
            return f"actor-{hello.index} belongs to another key"
        if hello.fingerprint != self._fingerprint:
            return (
                f"its task data (fingerprint {hello.fingerprint[:40]}) differ from those of the "
                f"service ({self._fingerprint}): give every node the same config and data files"
            )
        if hello.model_fingerprint != self._model_fingerprint:
            return (
                f"its model folder (fingerprint {hello.model_fingerprint[:40]}) differs from that "
                f"of the service ({self._model_fingerprint}): give every node the same model, "
                "tokenizer, chat template and section [model]"
            )
        learner = self._membership.learner
        if hello.role == "learner" and learner not in (None, peer):
            return f"the run already has a learner ({learner})"
        return None

    def _lost_reason(self, peer: str) -> str | None:
        reason = self._membership.lost.get(peer)
        return reason and f"this incarnation was declared lost ({reason}): start a new one"
