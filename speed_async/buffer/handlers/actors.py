"""The part of the service that serves the actors: requests, results, reports, departures and
losses.

consumes   messages of actors, except Hello, Failure and those about weights
waits for  nothing
answers    Leaving with a Drain; results update the lifecycle and the evidence of the diagnoses
"""

from collections.abc import Callable

from speed_async.buffer.components import Components
from speed_async.buffer.durability.journal import Place
from speed_async.buffer.handlers.effects import Effects, Loss, restart_warning
from speed_async.buffer.ledger import ENGINE_TIMES
from speed_async.config.sections.evaluate import HELD_OUT
from speed_async.environments.outcome_lengths import GAUGES
from speed_async.transport import messages as m
from speed_async.transport.groups import GroupStats
from speed_async.transport.joining import Leaving
from speed_async.types import LeaseKind


class ActorHandler:
    def __init__(self, components: Components) -> None:
        self._membership = components.membership
        self._lifecycle = components.lifecycle
        self._evidence = components.diagnoses.evidence
        self._warnings = components.warnings
        self.handlers: dict[type[m.Message], Callable[..., Effects | None]] = {
            m.WantWork: self._on_want,
            m.ScreenedOut: self._on_screened_out,
            m.Evaluated: self._on_evaluated,
            m.ActorReport: self._on_report,
            Leaving: self._on_leaving,
            m.Goodbye: self._on_goodbye,
            m.ActorExited: self._on_exited,
        }
        """Handlers by message class; each receives the peer, the message and the time."""

    def counted(self, peer: str, message: m.Counted, now_s: float) -> None:
        """A valid message of this actor arrived."""
        state = self._membership.actors[peer]
        state.last_message_s, state.disconnected_since_s = now_s, None
        ledger = self._lifecycle.ledger
        if message.counts.tokens_generated > ledger.actor(peer).last_counts.tokens_generated:
            state.progress_s = now_s
        ledger.update_counts(peer, message.counts)

    def timed_out(self, now_s: float, timeout_s: float) -> list[Loss]:
        """The actors without a message for this long, or without a connection."""
        losses: list[Loss] = []
        for state in self._membership.timed_out(now_s, timeout_s):
            silent = f"silent for {now_s - state.last_message_s:.0f} s"
            warning = restart_warning(state, f"was {silent}")
            losses.append(Loss(state=state, reason=silent, warning=warning))
        return losses

    def lose(self, loss: Loss) -> None:
        """Declare an actor lost and requeue its prompts."""
        state = loss.state
        self._membership.lose(state.name, loss.reason)
        self._lifecycle.holder_lost(state.name, loss.reason)
        self._warnings.close(f"weights of {state.name}")
        warning = loss.warning or restart_warning(state, f"is lost: {loss.reason}")
        self._warnings.open(f"actor-{state.index}", warning, transient=loss.transient)

    def close_warnings(self) -> None:
        """Close the warnings about actors that returned. Each was in at least one event."""
        for state in self._membership.present():
            if not state.awaits_weights:
                self._warnings.close(f"actor-{state.index}")

    def group_finished(
        self,
        peer: str,
        message: m.GroupFinished,
        now_s: float,
        *,
        stats: GroupStats,
        place: Place | None,
    ) -> None:
        """Add a valid group with these statistics, stored at `place` in the journal."""
        if self._is_leased(peer, message):
            self._evidence.group(stats, now_s)
        self._lifecycle.group_finished(peer, message, stats, place)

    def lease_failed(self, peer: str, message: m.LeaseFailed) -> Effects:
        known = self._lifecycle.unusable.describe()
        lease = self._lifecycle.leases.held_by(peer, message.lease_id)
        if lease is not None:
            training = lease.kind is LeaseKind.TRAINING
            self._evidence.failed(message.reason, training=training)
        evaluation = self._lifecycle.failed(peer, message)
        unusable = self._lifecycle.unusable.describe()
        if unusable != known:
            self._warnings.open("prompts", unusable)
        return Effects(evaluation=evaluation)

    def _on_screened_out(self, peer: str, message: m.ScreenedOut, now_s: float) -> None:
        if self._is_leased(peer, message):
            self._evidence.screened_out(message, now_s)
        self._lifecycle.screened_out(peer, message)

    def _on_evaluated(self, peer: str, message: m.Evaluated, now_s: float) -> Effects:
        lease = self._lifecycle.leases.held_by(peer, message.lease_id)
        if lease is not None and lease.suite == HELD_OUT:  # suites differ from the training data
            self._evidence.evaluated(message, now_s)
        return Effects(evaluation=self._lifecycle.evaluated(peer, message))

    def _is_leased(self, peer: str, message: m.GroupFinished | m.ScreenedOut) -> bool:
        """Whether the lease of this result is open, so that the result counts."""
        return self._lifecycle.leases.held_by(peer, message.lease_id) is not None

    def _on_want(self, peer: str, want: m.WantWork, now_s: float) -> None:
        self._membership.actors[peer].want = want.num_prompts

    def _on_report(self, peer: str, report: m.ActorReport, now_s: float) -> None:
        self._membership.actors[peer].gauges = report.gauges
        times_s = {name: report.gauges.get(name, 0.0) for name in ENGINE_TIMES}
        account = self._lifecycle.ledger.actor(peer)
        account.engine_times_s = times_s
        account.verifier_sums = {name: report.gauges.get(name, 0.0) for name in GAUGES}

    def _on_leaving(self, peer: str, leaving: Leaving, now_s: float) -> Effects:
        self._membership.actors[peer].leaving = True
        return Effects(messages=[(peer, m.Drain(reason="the actor is shutting down"))])

    def _on_goodbye(self, peer: str, goodbye: m.Goodbye, now_s: float) -> None:
        self._membership.leave(self._membership.actors[peer])
        self._lifecycle.holder_left(peer)

    def _on_exited(self, peer: str, message: m.ActorExited, now_s: float) -> Effects:
        """The supervisor of an actor reports its death, before its silence does."""
        state = self._membership.actors.get(f"{message.role}.{message.incarnation}")
        if state is None or state not in self._membership.present():
            return Effects()
        warning = restart_warning(state, message.how)
        return Effects(lost=[Loss(state=state, reason=message.how, warning=warning)])
