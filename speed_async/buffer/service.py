"""The buffer service as a pure state machine: messages in, messages and events out.

It uses no socket, clock or file. Every input brings its time and returns its Results, which
state_machine.py passes on.

consumes   messages of actors and of the learner
waits for  nothing
answers    a TakeBatch when enough fresh groups are buffered and the first evaluation is complete;
           a FinishRun when the final evaluation is complete and every actor sent Goodbye
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from speed_async.buffer.batches import Grants
from speed_async.buffer.components import Components
from speed_async.buffer.durability.journal import Place
from speed_async.buffer.handlers.actors import ActorHandler
from speed_async.buffer.handlers.effects import Effects, Loss, Results
from speed_async.buffer.handlers.ending import ROLE, Ending
from speed_async.buffer.handlers.evaluations import EvaluationHandler
from speed_async.buffer.handlers.learner import LearnerHandler
from speed_async.buffer.handlers.peers import PeerHandler
from speed_async.buffer.reporting.status import sample_event, status_values
from speed_async.buffer.state import ServiceState, new_state
from speed_async.buffer.validation import MessageValidator
from speed_async.buffer.validation_rules import PayloadRules
from speed_async.config.schema import Config
from speed_async.config.sections.evaluate import HELD_OUT
from speed_async.observability.metrics import Event, EventKind, Value
from speed_async.transport import messages as m
from speed_async.transport.joining import Join
from speed_async.types import GroupEnd

MAX_TICK_DELAY_S = 1.0
"""A tick later than this means that the process was suspended or starved and received nothing."""


class BufferService:
    def __init__(
        self,
        config: Config,
        *,
        num_prompts: int,
        num_held_out: int,
        suite_sizes: Mapping[str, int] = MappingProxyType({}),
        fingerprint: str,
        started_s: float,
        model_fingerprint: str = "",
        feed_port: int = 0,
        vocab_size: int | None = None,
        state: ServiceState | None = None,
    ) -> None:
        """`suite_sizes`: number of prompts of each suite of the configuration. `state` None: a new
        run, which starts at `started_s`. Raises JournalError if the state does not fit the
        configuration."""
        sizes = {HELD_OUT: num_held_out, **suite_sizes}
        state = state or new_state(config, num_prompts, sizes, started_s)
        self.state = state
        self.fingerprint = fingerprint
        """Fingerprint of the task data."""
        self.model_fingerprint = model_fingerprint
        """Fingerprint of the model folder."""
        self.config = config
        parts = Components.build(config, state, num_prompts=num_prompts, suite_sizes=sizes)
        self.components = parts
        self.membership, self.lifecycle = parts.membership, parts.lifecycle
        self.statistics, self.diagnoses = parts.statistics, parts.diagnoses
        self.warnings = parts.warnings
        self._evaluations = parts.evaluations
        self._evaluation = EvaluationHandler(parts, state)
        self._batches = parts.batches
        self._grants = Grants(config, self.lifecycle, parts.batches, self._evaluations)
        self._learner = LearnerHandler(parts)
        self._actors = ActorHandler(parts)
        self._handlers: dict[type[m.Message], Callable[..., Effects | None]] = {
            m.LeaseFailed: self._on_lease_failed,
            m.WeightsPublished: self._on_published,
            m.StopAsked: self._on_stop_asked,
            **self._actors.handlers,
            **self._learner.handlers,
        }
        """Handlers that need nothing but the peer, the message and the time."""
        others = {Join, m.Hello, m.Failure, m.Sample, m.GroupFinished, m.FinishRun}
        accepted = {*others, m.PrepareCheckpoint, *self._handlers}
        rules = PayloadRules(config, vocab_size)
        self.validator = MessageValidator(parts, fingerprint, model_fingerprint, accepted, rules)
        self._ending = Ending(parts, self.validator, state.shutdown)
        self._peers = PeerHandler(parts, self._ending, self.validator, feed_port)

    # --- inputs ----------------------------------------------------------------------------

    def handle(
        self,
        peer: str,
        message: m.Message,
        now_s: float,
        key: str = "",
        *,
        place: Place | None = None,
        sequence: int = 0,
    ) -> Results:
        """Process one message of `peer`, which has this public key. An invalid message is answered
        with Rejected; it does not raise. `place` and `sequence` are those of its journal record."""
        results = Results()
        checked = self.validator.check(peer, message, key)
        if checked.refusal:
            self._refuse(peer, checked.refusal, results)
            self._advance(now_s, results)
            return results
        if isinstance(message, m.Counted):
            self._actors.counted(peer, message, now_s)
        effects = None
        match message:
            case Join() | m.Hello() | m.Failure():
                effects = self._peers.handle(peer, message, now_s, key)
            case m.Sample():  # affects no count and no decision
                wall_s = now_s - self.statistics.started_s
                results.events.append(sample_event(peer, message, wall_s))
            case m.GroupFinished():
                assert checked.group is not None, "a valid group has statistics"
                stats = checked.group
                self._actors.group_finished(peer, message, now_s, stats=stats, place=place)
            case m.FinishRun():
                self._ending.request(message, now_s)
            case m.PrepareCheckpoint(policy_version=version):
                # The server delays this reply until all records up to it are durable.
                durable = m.JournalDurable(policy_version=version, service_sequence=sequence)
                results.messages.append((peer, durable))
            case _:
                effects = self._handlers[type(message)](peer, message, now_s)
        if effects is not None:
            self._apply(effects, now_s, results)
        self._advance(now_s, results)
        return results

    def _apply(self, effects: Effects, now_s: float, results: Results) -> None:
        results.messages += effects.messages
        self._send_learner(effects.to_learner, results)
        for loss in effects.lost:
            self._lose(loss, results)
        if effects.failure:
            self._fail(effects.failure, now_s, results)
        if effects.evaluation is not None:
            self._apply(self._evaluation.completed(effects.evaluation), now_s, results)
        for kind, values in effects.events:
            results.events.append(self._event(kind, now_s, values))
        results.snapshot_due = results.snapshot_due or effects.snapshot_due
        self.state.ended = self.ended or effects.ended

    def reply_without_record(self, peer: str, message: m.Message, key: str) -> m.Message | None:
        """The reply to a message that changes no state and needs no journal record; None for other
        messages."""
        return self._peers.reply_without_record(peer, message, key, self.state.attempt)

    def tick(self, now_s: float, loop_lag_s: float = 0.0) -> Results:
        """Advance the time: peer timeouts, drain deadline, rates, a status event."""
        results = Results()
        self.state.loop_lag_s = loop_lag_s
        if loop_lag_s > MAX_TICK_DELAY_S:
            self.membership.extend_timeouts(loop_lag_s)
        for loss in self._actors.timed_out(now_s, self.config.cluster.peer_timeout_s):
            self._lose(loss, results)
        results.expired_joins += self.membership.expire_joins(now_s)
        if self.lifecycle.expire(now_s - self.config.buffer.lease_timeout_s):
            text = "leases expired (buffer.lease_timeout_s); their prompts are leased again"
            self.warnings.open("leases", text, transient=True)
        ledger = self.lifecycle.ledger
        trained = ledger.ends[GroupEnd.TRAINED].tokens
        self.statistics.tokens(now_s, ledger.tokens_generated, trained)
        self._advance(now_s, results)
        if stalled := self._ending.check_stalled(now_s):
            self._fail(stalled, now_s, results)
        pending = [*self._batches.pending(now_s), *self._ending.pending(now_s)]
        self._send_learner(pending, results)
        results.events.append(self.present_status(now_s))
        self._actors.close_warnings()
        self.warnings.close_expired(now_s)
        return results

    def gone(self, peer: str, now_s: float) -> None:
        """A peer lost its connection. `tick` declares an actor lost that does not reconnect."""
        state = self.membership.actors.get(peer)
        if state is not None and state.disconnected_since_s is None:
            state.disconnected_since_s = now_s

    def refused(self, peer: str, reason: str, now_s: float) -> Results:
        """The hub or the session layer refused a message of this peer."""
        results = Results()
        self._lose_refused(peer, reason, results)
        self._advance(now_s, results)
        return results

    def begin_attempt(self, attempt: int) -> Results:
        """All processes were restarted; none of the old ones returns."""
        results = Results(snapshot_due=True)
        self.state.attempt = attempt
        self.state.ended = False
        self._learner.begin_attempt()
        for state in self.membership.present():
            self._lose(Loss(state=state, reason="the run was restarted"), results)
            self.warnings.close(f"actor-{state.index}")  # no supervisor restarts that process
        self.membership.begin_attempt()
        self._ending.begin_attempt()
        self.state.target_reached = False
        self.warnings.close("attempt")
        if self.policy_version == 0:  # else the learner says what it resumes from
            text = f"restarted (attempt {attempt}) before the first update"
            self.warnings.open("attempt", text, transient=True)
        self.state.phase = self._ending.phase
        return results

    @property
    def ended(self) -> bool:
        """The service has ended; the server flushes its messages and exits."""
        return self.state.ended

    @property
    def policy_version(self) -> int:
        """Newest trained version."""
        return self.lifecycle.groups.policy_version

    @property
    def warning(self) -> str:
        return self.warnings.text

    # --- losses and failures -----------------------------------------------------------------

    def _fail(self, text: str, now_s: float, results: Results) -> None:
        """End the run because of an error of the service."""
        failure = m.Failure(role=ROLE, message=text)
        self._apply(self._ending.failed("", failure, now_s), now_s, results)

    def _refuse(self, peer: str, reason: str, results: Results) -> None:
        """Send Rejected and block the peer. An actor is declared lost and its prompts requeued."""
        results.messages.append((peer, self.validator.refuse(peer, reason)))
        self._lose_refused(peer, reason, results)

    def _lose_refused(self, peer: str, reason: str, results: Results) -> None:
        state = self.membership.actors.get(peer)
        if state is not None and not state.departed:
            self._lose(Loss(state=state, reason=f"its message was refused: {reason}"), results)

    def _lose(self, loss: Loss, results: Results) -> None:
        self._actors.lose(loss)
        results.lost_peers.append(loss.state.name)
        self._send_learner(self.components.weight_group.lose(loss.state.name), results)

    # --- evaluations, checkpoints and weights --------------------------------------------------

    def _on_lease_failed(self, peer: str, message: m.LeaseFailed, now_s: float) -> Effects:
        effects = self._actors.lease_failed(peer, message)
        if self.lifecycle.is_exhausted and not self._ending.is_requested:
            return Effects(failure=self.lifecycle.unusable.describe_exhausted())
        return effects

    def _on_published(self, peer: str, message: m.WeightsPublished, now_s: float) -> Effects:
        to_learner = [] if self._ending.is_requested else self._evaluation.published(message)
        return replace(self._learner.published(message), to_learner=to_learner)

    def _on_stop_asked(self, peer: str, asked: m.StopAsked, now_s: float) -> Effects:
        self._ending.ask_stop()
        self.state.phase = self._ending.phase
        return Effects(events=[("status", {})])  # immediately, as feedback to Ctrl-C

    # --- transitions that depend on the current state ----------------------------------------

    def _advance(self, now_s: float, results: Results) -> None:
        """Perform every transition that the current state permits."""
        if self.ended:
            return
        while not self.ended:
            effects = self._ending.next(now_s, attempt=self.state.attempt)
            if effects is None:
                break
            self._apply(effects, now_s, results)
        self.state.phase = self._ending.phase
        if not self._ending.is_draining:
            present, training = self.membership.present(), not self._ending.is_requested
            version = self.policy_version
            results.messages += self._grants.next(present, version, now_s, training=training)
        if self._evaluations.held_out.evaluated_version is not None:
            batch = self._learner.poll_batch(now_s, evaluating=self._evaluations.is_running)
            self._send_learner(batch, results)

    # --- output ----------------------------------------------------------------------------

    def _send_learner(self, messages: Sequence[m.Message], results: Results) -> None:
        """Send messages to the learner if it is connected."""
        if (learner := self.membership.learner) is not None:
            results.messages += [(learner, message) for message in messages]

    def present_status(self, now_s: float) -> Event:
        """A status event for this time."""
        return self._event("status", now_s, {})

    def _event(self, kind: EventKind, now_s: float, values: dict[str, Value]) -> Event:
        status = status_values(self.components, self.validator, self.state, now_s)
        return Event(kind=kind, values=status | values)
