"""The buffer service as a pure state machine: messages in, messages and events out.

It uses no socket, clock or file. `handle` and `tick` receive the time, and server.py sends the
results that they leave in `outbox` and `events`.

consumes   messages of actors and of the learner
waits for  nothing
answers    a TakeBatch when enough fresh groups are buffered and the first evaluation is complete;
           a FinishRun when the final evaluation is complete and every actor sent Goodbye
"""

from collections.abc import Callable

from speed_async.buffer.actor_handler import ActorHandler
from speed_async.buffer.curriculum.curriculum import make_curriculum
from speed_async.buffer.durability.journal import Place
from speed_async.buffer.effects import Effects, Loss, restart_warning
from speed_async.buffer.ending import ROLE, Ending
from speed_async.buffer.evaluations import Accuracy, EvaluationPlan
from speed_async.buffer.grants import Grants
from speed_async.buffer.learner_handler import LearnerHandler
from speed_async.buffer.lifecycle import Lifecycle
from speed_async.buffer.membership import Membership
from speed_async.buffer.reporting.diagnoses import Diagnoses
from speed_async.buffer.reporting.status import StatusReporter, evaluation_values
from speed_async.buffer.reporting.warnings import Warnings
from speed_async.buffer.state import ServiceState, new_state
from speed_async.buffer.validation import Checked, MessageValidator
from speed_async.buffer.validation_rules import PayloadRules
from speed_async.config.schema import Config
from speed_async.observability.metrics import Event, EventKind, Value
from speed_async.transport import messages as m
from speed_async.transport.joining import Join, JoinAccepted
from speed_async.types import GroupEnd

MAX_TICK_DELAY_S = 1.0
"""A tick later than this means that the process was suspended or starved and received nothing."""
MAX_REASON_CHARS = 500


class BufferService:
    def __init__(
        self,
        config: Config,
        *,
        num_prompts: int,
        num_held_out: int,
        fingerprint: str,
        started_s: float,
        model_fingerprint: str = "",
        feed_port: int = 0,
        vocab_size: int | None = None,
        state: ServiceState | None = None,
    ) -> None:
        """`state` None: a new run, which starts at `started_s`. Raises JournalError if the state
        does not fit the configuration."""
        is_new = state is None
        if state is None:
            state = new_state(config, num_prompts=num_prompts, started_s=started_s)
        self.state = state
        self.fingerprint = fingerprint
        """Fingerprint of the task data."""
        self.model_fingerprint = model_fingerprint
        """Fingerprint of the model folder."""
        self.outbox: list[tuple[str, m.Message]] = []
        self.events: list[Event] = []
        self.lost_peers: list[str] = []
        """Newly lost peers, whose sessions the state machine discards."""
        self.expired_joins: list[str] = []
        """Supervisors of newly expired joins, whose sessions the state machine removes."""
        self.snapshot_due = False
        """A checkpoint is durable or an attempt began, so a snapshot makes older records
        unnecessary."""
        self.config = config
        self.membership = Membership(config.cluster, state.membership)
        self.statistics = state.statistics
        self.diagnoses = Diagnoses(config, self.statistics, state.diagnoses)
        self.curriculum = make_curriculum(config, num_prompts, state.curriculum)
        self._evaluations = EvaluationPlan(
            state.evaluations,
            num_prompts=num_held_out,
            num_samples=config.evaluate.num_samples,
            every=config.evaluate.every,
        )
        self.lifecycle = Lifecycle(
            config,
            curriculum=self.curriculum,
            evaluations=self._evaluations,
            statistics=self.statistics,
            state=state.lifecycle,
        )
        self.warnings = Warnings(state.warnings)
        """Current warnings for the user."""
        self.learner = LearnerHandler(
            config,
            membership=self.membership,
            lifecycle=self.lifecycle,
            statistics=self.statistics,
            updates=self.diagnoses.evidence.updates,
            weight_times=state.weight_times,
            warnings=self.warnings,
            state=state.learner,
        )
        self._actors = ActorHandler(
            membership=self.membership,
            lifecycle=self.lifecycle,
            evidence=self.diagnoses.evidence,
            warnings=self.warnings,
        )
        self._grants = Grants(config, self.lifecycle, self.learner.batches, self._evaluations)
        self._feed_port = feed_port
        self._handlers: dict[type[m.Message], Callable[..., Effects | None]] = {
            m.Failure: self._on_failure,
            m.LeaseFailed: self._on_lease_failed,
            m.Sample: self._on_sample,
            m.WeightsPublished: self._on_published,
            m.StopAsked: self._on_stop_asked,
            m.FinishRun: self._on_finish,
            m.CheckpointSaved: self._on_saved,
            **self._actors.handlers,
            **self.learner.handlers,
        }
        """Handlers that need nothing but the peer, the message and the time."""
        self.validator = MessageValidator(
            self.membership,
            fingerprint,
            model_fingerprint,
            {Join, m.Hello, m.GroupFinished, m.PrepareCheckpoint, *self._handlers},
            PayloadRules(config, vocab_size),
            self.lifecycle,
        )
        self.reporter = StatusReporter(
            config,
            membership=self.membership,
            lifecycle=self.lifecycle,
            evaluations=self._evaluations,
            statistics=self.statistics,
            diagnoses=self.diagnoses,
            warnings=self.warnings,
            weight_times=state.weight_times,
            validator=self.validator,
        )
        self._ending = Ending(
            config,
            membership=self.membership,
            lifecycle=self.lifecycle,
            batches=self.learner.batches,
            evaluations=self._evaluations,
            diagnoses=self.diagnoses,
            warnings=self.warnings,
            reporter=self.reporter,
            state=state.ending,
        )
        if is_new:
            self._evaluations.start(0)

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
    ) -> None:
        """Process one message of `peer`, which has this public key. An invalid message is answered
        with Rejected; it does not raise. `place` and `sequence` are those of its journal record."""
        checked = self._check(peer, message, key)
        if checked.refusal:
            self._refuse(peer, checked.refusal)
            self._advance(now_s)
            return
        if isinstance(message, m.Counted):
            self._actors.counted(peer, message, now_s)
        match message:
            case Join():
                self._on_join(peer, now_s, key)
            case m.Hello():
                self._on_hello(peer, message, now_s, key)
            case m.GroupFinished():
                assert checked.group is not None, "a valid group has statistics"
                stats = checked.group
                self._actors.group_finished(peer, message, now_s, stats=stats, place=place)
            case m.PrepareCheckpoint():
                self._on_prepare(peer, message, sequence)
            case _:
                effects = self._handlers[type(message)](peer, message, now_s)
                if effects is not None:
                    self._apply(effects, now_s)
        self._advance(now_s)

    def _check(self, peer: str, message: m.Message, key: str) -> Checked:
        newest_version = self.learner.newest_version
        return self.validator.check(peer, message, newest_version=newest_version, key=key)

    def _apply(self, effects: Effects, now_s: float) -> None:
        self.outbox += effects.messages
        self._send_learner(*effects.to_learner)
        for loss in effects.lost:
            self._lose(loss)
        if effects.failure:
            self._fail(effects.failure, now_s)
        if effects.evaluation is not None:
            self._evaluation_done(effects.evaluation, now_s)
        for kind, values in effects.events:
            self._emit(kind, now_s, values)
        self.state.ended = self.ended or effects.ended

    def reply_without_record(self, peer: str, message: m.Message, key: str) -> m.Message | None:
        """The reply to a message that changes no state and needs no journal record; None for other
        messages. These are refused messages of unknown peers, repeated joins, and joins of the
        supervisors of ranks."""
        if isinstance(message, Join) and not self._ending.is_requested:
            index = self.membership.index_of(peer)
            if index is not None:
                return self._accepted(index)
        if self.validator.is_member(peer):
            return None
        checked = self._check(peer, message, key)
        if checked.refusal:
            self.validator.refused(peer)
            return m.Rejected(reason=checked.refusal[:MAX_REASON_CHARS])
        if isinstance(message, Join) and message.has_rank:
            return self._accepted(message.rank, self.state.attempt)
        return None

    def tick(self, now_s: float, loop_lag_s: float = 0.0) -> None:
        """Advance the time: peer timeouts, drain deadline, rates, a status event."""
        self.state.loop_lag_s = loop_lag_s
        if loop_lag_s > MAX_TICK_DELAY_S:
            self.membership.extend_timeouts(loop_lag_s)
        for loss in self._actors.timed_out(now_s, self.config.cluster.peer_timeout_s):
            self._lose(loss)
        self.expired_joins += self.membership.expire_joins(now_s)
        if self.lifecycle.expire(now_s - self.config.buffer.lease_timeout_s):
            text = "leases expired (buffer.lease_timeout_s); their prompts are leased again"
            self.warnings.open("leases", text, transient=True)
        ledger = self.lifecycle.ledger
        trained = ledger.ends[GroupEnd.TRAINED].tokens
        self.statistics.tokens(now_s, ledger.tokens_generated, trained)
        self._advance(now_s)
        if stalled := self._ending.check_stalled(now_s):
            self._fail(stalled, now_s)
        self._emit("status", now_s, {})
        self._actors.close_warnings()
        self.warnings.close_expired(now_s)

    def gone(self, peer: str, now_s: float) -> None:
        """A peer lost its connection. `tick` declares an actor lost that does not reconnect."""
        state = self.membership.actors.get(peer)
        if state is not None and state.disconnected_since_s is None:
            state.disconnected_since_s = now_s

    def refused(self, peer: str, reason: str, now_s: float) -> None:
        """The hub or the session layer refused a message of this peer."""
        self._lose_refused(peer, reason)
        self._advance(now_s)

    def begin_attempt(self, attempt: int, now_s: float) -> None:
        """All processes were restarted; none of the old ones returns."""
        self.state.attempt = attempt
        self.state.ended = False
        for state in self.membership.present():
            self._lose(Loss(state=state, reason="the run was restarted"))
        self.membership.begin_attempt()
        self.learner.begin_attempt()
        self._ending.begin_attempt()
        self.state.target_reached = False
        self.snapshot_due = True
        text = f"restarted (attempt {attempt}) at version {self.policy_version}"
        self.warnings.open("attempt", text, transient=True)
        self.state.phase = self._current_phase()

    @property
    def ended(self) -> bool:
        """The service has ended; the server flushes its messages and exits."""
        return self.state.ended

    @property
    def policy_version(self) -> int:
        """Newest trained version."""
        return self.lifecycle.policy_version

    @property
    def warning(self) -> str:
        return self.warnings.text

    # --- peers -----------------------------------------------------------------------------

    def _on_join(self, peer: str, now_s: float, key: str) -> None:
        if self._ending.is_requested:
            self._send(peer, m.Rejected(reason="this run is ending"))
            return
        self._send(peer, self._accepted(self.membership.admit(peer, key, now_s)))

    def _accepted(self, index: int, attempt: int = 0) -> JoinAccepted:
        """`attempt` is that of the run for a rank, and 0 for an actor that joined."""
        return JoinAccepted(
            index=index,
            config=self.config.model_dump_json(),
            feed_port=self._feed_port,
            incarnation=self.membership.next_incarnation(index, attempt),
        )

    def _on_hello(self, peer: str, hello: m.Hello, now_s: float, key: str) -> None:
        if hello.role == "learner":
            self.membership.learner_joined(peer)
        elif peer not in self.membership.actors:
            for state in self.membership.join(peer, hello, now_s, self.policy_version, key=key):
                warning = restart_warning(state, "was killed or exited")
                self._lose(Loss(state=state, reason="restarted", warning=warning))
            if self.policy_version > 0:
                self._send_learner(m.MembershipChanged(reason=f"{peer} joined"))
        self._send(peer, m.Welcome(policy_version=self.policy_version))
        if self._ending.is_draining:
            self._send(peer, m.Drain(reason="the run is ending"))

    def _on_failure(self, peer: str, failure: m.Failure, now_s: float) -> None:
        """The failure of an actor that joined removes it; that of any other role ends the run."""
        withdrawn = self.membership.withdraw(peer)
        if withdrawn is not None:
            for state in withdrawn:
                self._lose(Loss(state=state, reason="its supervisor failed"))
            text = f"{failure.role} left: {failure.message}"
            self.warnings.open(failure.role, text, transient=True)
            return
        self._apply(self._ending.failed(peer, failure, now_s), now_s)

    def _fail(self, text: str, now_s: float) -> None:
        """End the run because of an error of the service."""
        self._on_failure("", m.Failure(role=ROLE, message=text), now_s)

    def _on_sample(self, peer: str, sample: m.Sample, now_s: float) -> None:
        """Emit a sample event. Samples affect no count and no decision."""
        self.events.append(self.reporter.sample(peer, sample, now_s))

    def _refuse(self, peer: str, reason: str) -> None:
        """Send Rejected and block the peer. An actor is declared lost and its prompts requeued."""
        self._send(peer, m.Rejected(reason=reason[:MAX_REASON_CHARS]))
        self.validator.refused(peer)
        self._lose_refused(peer, reason)

    def _lose_refused(self, peer: str, reason: str) -> None:
        state = self.membership.actors.get(peer)
        if state is not None and not state.departed:
            self._lose(Loss(state=state, reason=f"its message was refused: {reason}"))

    def _lose(self, loss: Loss) -> None:
        self._actors.lose(loss)
        self.lost_peers.append(loss.state.name)

    # --- results ---------------------------------------------------------------------------

    def _on_lease_failed(self, peer: str, message: m.LeaseFailed, now_s: float) -> Effects:
        effects = self._actors.lease_failed(peer, message)
        if self.lifecycle.is_exhausted and not self._ending.is_requested:
            return Effects(failure=self.lifecycle.unusable.describe_exhausted())
        return effects

    def _evaluation_done(self, evaluation: Accuracy, now_s: float) -> None:
        accuracy, version = evaluation.accuracy, evaluation.policy_version
        self.state.evaluated_version = version
        self.statistics.evaluated(accuracy, version)
        self.diagnoses.evaluated(accuracy, evaluation.num_completions, version)
        self._emit("evaluation", now_s, evaluation_values(evaluation))
        target = self.config.run.stop_at_accuracy
        if target is not None and accuracy >= target and not self.state.target_reached:
            self.state.target_reached = True
            self._send_learner(m.TargetReached(accuracy=accuracy, policy_version=version))

    # --- checkpoints and weights -------------------------------------------------------------

    def _on_prepare(self, peer: str, message: m.PrepareCheckpoint, sequence: int) -> None:
        """The server delays this reply until all records up to it are durable."""
        version = message.policy_version
        self._send(peer, m.JournalDurable(policy_version=version, service_sequence=sequence))

    def _on_saved(self, peer: str, saved: m.CheckpointSaved, now_s: float) -> None:
        self.lifecycle.lineage.prune(saved.oldest_kept_version)
        self.snapshot_due = True

    def _on_published(self, peer: str, message: m.WeightsPublished, now_s: float) -> Effects:
        evaluated = self.state.evaluated_version == message.policy_version  # published again
        due = not message.error and self._evaluations.due(message.policy_version)
        if due and not evaluated and not self._ending.is_requested:
            self._evaluations.start(message.policy_version)
        return self.learner.published(message)

    def _on_stop_asked(self, peer: str, asked: m.StopAsked, now_s: float) -> Effects:
        self._ending.ask_stop()
        self.state.phase = self._current_phase()
        return Effects(events=[("status", {})])  # immediately, as feedback to Ctrl-C

    def _on_finish(self, peer: str, finish: m.FinishRun, now_s: float) -> None:
        self._ending.request(finish, now_s)

    # --- transitions that depend on the current state ----------------------------------------

    def _advance(self, now_s: float) -> None:
        """Perform every transition that the current state permits."""
        if self.ended:
            return
        self._advance_ending(now_s)
        self.state.phase = self._current_phase()
        if not self._ending.is_draining:
            self._grant(now_s)
        if self.state.evaluated_version is not None:
            evaluating = self._evaluations.target_version is not None
            self._send_learner(*self.learner.poll_batch(now_s, evaluating=evaluating))

    def _advance_ending(self, now_s: float) -> None:
        while not self.ended:
            effects = self._ending.next(
                now_s, attempt=self.state.attempt, evaluated_version=self.state.evaluated_version
            )
            if effects is None:
                return
            self._apply(effects, now_s)

    def _current_phase(self) -> str:
        return self._ending.phase(evaluated=self.state.evaluated_version is not None)

    def _grant(self, now_s: float) -> None:
        training = not self._ending.is_requested
        present = self.membership.present()
        self.outbox += self._grants.next(present, self.policy_version, now_s, training=training)

    # --- output ----------------------------------------------------------------------------

    def _send(self, peer: str, message: m.Message) -> None:
        self.outbox.append((peer, message))

    def _send_learner(self, *messages: m.Message) -> None:
        """Send messages to the learner if it is connected."""
        if (learner := self.membership.learner) is not None:
            self.outbox += [(learner, message) for message in messages]

    def present_status(self, now_s: float) -> Event:
        """A status event for this time."""
        return self._event("status", now_s, {})

    def _emit(self, kind: EventKind, now_s: float, values: dict[str, Value]) -> None:
        self.events.append(self._event(kind, now_s, values))

    def _event(self, kind: EventKind, now_s: float, values: dict[str, Value]) -> Event:
        phase, loop_lag_s = self.state.phase, self.state.loop_lag_s
        status = self.reporter.values(now_s, phase=phase, loop_lag_s=loop_lag_s)
        return Event(kind=kind, values=status | values)
