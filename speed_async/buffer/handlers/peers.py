"""The part of the service that admits peers and handles their failures.

consumes   Join, Hello and Failure
waits for  nothing
answers    Join with JoinAccepted, Hello with Welcome
"""

from speed_async.buffer.components import Components
from speed_async.buffer.handlers.effects import (
    Effects,
    Loss,
    evaluation_messages,
    restart_warning,
)
from speed_async.buffer.handlers.ending import Ending
from speed_async.buffer.validation import MessageValidator
from speed_async.transport import messages as m
from speed_async.transport.joining import Join, JoinAccepted


class PeerHandler:
    def __init__(
        self,
        components: Components,
        ending: Ending,
        validator: MessageValidator,
        feed_port: int,
    ) -> None:
        self._config = components.config
        self._membership = components.membership
        self._lifecycle = components.lifecycle
        self._evaluations = components.evaluations
        self._warnings = components.warnings
        self._ending = ending
        self._validator = validator
        self._feed_port = feed_port

    def reply_without_record(
        self, peer: str, message: m.Message, key: str, attempt: int
    ) -> m.Message | None:
        """The reply to a message that changes no state and needs no journal record; None for other
        messages. These are refused messages of unknown peers, repeated joins, and joins of the
        supervisors of ranks."""
        if isinstance(message, Join) and not self._ending.is_requested:
            index = self._membership.index_of(peer)
            if index is not None:
                return self._accepted(index)
        if self._validator.is_member(peer):
            return None
        checked = self._validator.check(peer, message, key)
        if checked.refusal:
            return self._validator.refuse(peer, checked.refusal)
        if isinstance(message, Join) and message.has_rank:
            return self._accepted(message.rank, attempt)
        return None

    def handle(
        self, peer: str, message: Join | m.Hello | m.Failure, now_s: float, key: str
    ) -> Effects:
        match message:
            case Join():
                return self._on_join(peer, now_s, key)
            case m.Hello():
                return self._on_hello(peer, message, now_s, key)
            case m.Failure():
                return self._on_failure(peer, message, now_s)

    def _on_join(self, peer: str, now_s: float, key: str) -> Effects:
        if self._ending.is_requested:
            return Effects(messages=[(peer, m.Rejected(reason="this run is ending"))])
        accepted = self._accepted(self._membership.admit(peer, key, now_s))
        return Effects(messages=[(peer, accepted)])

    def _accepted(self, index: int, attempt: int = 0) -> JoinAccepted:
        """The reply to a join. `attempt` is that of the run for a rank, and 0 otherwise."""
        return JoinAccepted(
            index=index,
            config=self._config.model_dump_json(),
            feed_port=self._feed_port,
            incarnation=self._membership.next_incarnation(index, attempt),
        )

    def _on_hello(self, peer: str, hello: m.Hello, now_s: float, key: str) -> Effects:
        version = self._lifecycle.groups.policy_version
        messages: list[tuple[str, m.Message]] = []
        lost: list[Loss] = []
        if hello.role == "learner":
            self._membership.learner_joined(peer)
        elif peer not in self._membership.actors:
            for state in self._membership.join(peer, hello, now_s, version, key=key):
                warning = restart_warning(state, "was killed or exited")
                lost.append(Loss(state=state, reason="restarted", warning=warning))
            if version > 0 and (learner := self._membership.learner) is not None:
                messages.append((learner, m.MembershipChanged(reason=f"{peer} joined", lost=[])))
        messages.append((peer, m.Welcome(policy_version=version)))
        if hello.role == "learner":
            messages += [(peer, message) for message in evaluation_messages(self._evaluations)]
        if self._ending.is_draining:
            messages.append((peer, m.Drain(reason="the run is ending")))
        return Effects(messages=messages, lost=lost)

    def _on_failure(self, peer: str, failure: m.Failure, now_s: float) -> Effects:
        """The failure of an actor that joined removes it; that of any other role ends the run."""
        withdrawn = self._membership.withdraw(peer)
        if withdrawn is None:
            return self._ending.failed(peer, failure, now_s)
        text = f"{failure.role} left: {failure.message}"
        self._warnings.open(failure.role, text, transient=True)
        return Effects(
            lost=[
                Loss(state=state, reason="its supervisor failed", warning=text, transient=True)
                for state in withdrawn
            ]
        )
