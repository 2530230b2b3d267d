"""Which messages the service will not take, and what their senders are told."""

from collections.abc import Collection

from speed_async.buffer.membership import Membership
from speed_async.wire import messages as m
from speed_async.wire.joining import Join


class Gatekeeper:
    def __init__(
        self, membership: Membership, fingerprint: str, accepted: Collection[type[m.Message]]
    ) -> None:
        self._membership = membership
        self._fingerprint = fingerprint
        self._accepted = accepted

    def refusal(self, peer: str, message: m.Message) -> str | None:
        """Why `message` of `peer` is out of place, or None when it is welcome."""
        kind = type(message).__name__
        if type(message) not in self._accepted:
            return f"{kind} is not for the service"
        if isinstance(message, m.Counted) and peer not in self._membership.actors:
            return self._lost(peer) or "unknown actor: say Hello first"
        open_to_all = isinstance(message, m.Counted | m.Hello | m.Failure | Join)
        if not open_to_all and peer != self._membership.learner:
            return f"{kind} is the learner's to send"
        match message:
            case m.Hello():
                return self._stranger(peer, message)
            case m.ScreenedOut(num_passed=passed, num_completions=sampled):
                return _impossible(kind, passed, sampled)
            case m.Evaluated(num_passed=passed, num_completions=sampled):
                return _impossible(kind, passed, sampled)
            case _:
                return None

    def _stranger(self, peer: str, hello: m.Hello) -> str | None:
        if lost := self._lost(peer):
            return lost
        if hello.weight_ranks < 1:
            return f"Hello.weight_ranks is {hello.weight_ranks}: an engine has 1 at least"
        if hello.fingerprint != self._fingerprint:
            return (
                f"its task data (fingerprint {hello.fingerprint}) differ from the service's "
                f"({self._fingerprint}): give every node the same config and data files"
            )
        return None

    def _lost(self, peer: str) -> str | None:
        reason = self._membership.lost.get(peer)
        return reason and f"this incarnation was given up as lost ({reason}): start a new one"


def _impossible(kind: str, num_passed: int, num_completions: int) -> str | None:
    if 0 <= num_passed <= num_completions:
        return None
    return f"{kind} says that {num_passed} of {num_completions} completions passed"
