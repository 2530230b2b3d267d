"""The buffer service as a pure state machine: messages in, messages and events out.

It touches no socket, clock or file: `handle` and `tick` are given the time, and their results
wait in `outbox` and `events` for the shell (server.py) to send.

consumes   messages of actors and of the learner
waits for  nothing
answers    a TakeBatch when enough fresh groups are buffered and the first evaluation is done;
           a FinishRun when the last evaluation is done and every actor said goodbye
"""

from collections.abc import Callable

from speed_async.buffer.curriculum.curriculum import Curriculum
from speed_async.buffer.ending import Ending, Step
from speed_async.buffer.evaluations import Accuracy, Evaluations
from speed_async.buffer.grants import Grants
from speed_async.buffer.learner_handler import LearnerHandler
from speed_async.buffer.ledger import ENGINE_TIMES
from speed_async.buffer.lifecycle import Lifecycle
from speed_async.buffer.membership import ActorState, Membership
from speed_async.buffer.reporting.diagnoses import Diagnoses
from speed_async.buffer.reporting.statistics import RunStatistics
from speed_async.buffer.reporting.status import (
    evaluation_values,
    stall_reason,
    status_values,
    summary_values,
)
from speed_async.buffer.reporting.warnings import Warnings
from speed_async.buffer.validation import MessageValidator
from speed_async.buffer.validation_rules import PayloadRules
from speed_async.config.schema import Config
from speed_async.errors import RoleError
from speed_async.observability.metrics import Event, EventKind, Value
from speed_async.observability.summary import STOPPING
from speed_async.transport import messages as m
from speed_async.transport.joining import Join, JoinAccepted, Leaving
from speed_async.types import GroupEnd, LeaseKind

ROLE = "buffer service"
HELD_UP_S = 1.0
"""A tick this late means that the service was stopped or starved, and heard nobody meanwhile."""
MAX_REASON_CHARS = 500


class BufferService:
    CONFIGURED = (
        "fingerprint",
        "model_fingerprint",
        "_handlers",
        "validator",
        "_feed_port",
        "outbox",
        "events",
        "place",
        "notes",
    )

    def __init__(
        self,
        config: Config,
        *,
        curriculum: Curriculum,
        evaluations: Evaluations,
        fingerprint: str,
        started_s: float,
        model_fingerprint: str = "",
        feed_port: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        """Of the task's data."""
        self.model_fingerprint = model_fingerprint
        """Of the model folder."""
        self.outbox: list[tuple[str, m.Message]] = []
        self.events: list[Event] = []
        self.given_up: list[str] = []
        """Peers to which nothing need be said any more; for the conversations to take note of."""
        self.forgotten: list[str] = []
        """Peers that joined, and of whom nothing followed; likewise."""
        self.ended = False
        """Everything was said; the shell may flush and leave."""
        self.snapshot_due = False
        """A checkpoint is durable, or a life began: what lies before a snapshot is not needed."""
        self.life = 0
        """How often this run was started again."""
        self.sequence = 0
        """Of the present input in the journal."""
        self.place: tuple[int, int] | None = None
        """Where it lies."""
        self.phase = "starting"
        self.config = config
        self.started_s = started_s
        self.membership = Membership(config.cluster)
        self.statistics = RunStatistics(started_s)
        self.diagnoses = Diagnoses(config, self.statistics, started_s)
        self.lifecycle = Lifecycle(
            config, curriculum=curriculum, evaluations=evaluations, statistics=self.statistics
        )
        self.learner = LearnerHandler(
            config,
            self,
            membership=self.membership,
            lifecycle=self.lifecycle,
            statistics=self.statistics,
            updates=self.diagnoses.evidence.updates,
        )
        self.loop_lag_s: float | None = None
        """How late the last tick came; None before the first."""
        self.notes = ""
        """What was lost before this process began; it stands before every warning."""
        self.warnings = Warnings()
        """What a person should know of now."""
        self._evaluations = evaluations
        self._baseline_done = False
        self._grants = Grants(config, self.lifecycle, self.learner.batches, evaluations)
        self._feed_port = feed_port
        self._target_reached = False
        self._stop_asked = False
        self._ending = Ending(config.cluster)
        self._evaluated_version: int | None = None
        self._handlers: dict[type[m.Message], Callable[..., None]] = {
            m.Failure: self._on_failure,
            m.WantWork: self._on_want,
            m.GroupFinished: self._on_group,
            m.ScreenedOut: self._on_screened_out,
            m.LeaseFailed: self._on_lease_failed,
            m.Evaluated: self._on_evaluated,
            m.Sample: self._on_sample,
            m.ActorReport: self._on_report,
            m.WeightsApplied: self._on_applied,
            Leaving: self._on_leaving,
            m.Goodbye: self._on_goodbye,
            m.WeightsPublished: self._on_published,
            m.StopAsked: self._on_stop_asked,
            m.FinishRun: self._on_finish,
            m.PrepareCheckpoint: self._on_prepare,
            m.CheckpointSaved: self._on_saved,
        } | self.learner.handlers
        self.validator = MessageValidator(
            self.membership,
            fingerprint,
            model_fingerprint,
            {Join, m.Hello, *self._handlers},
            PayloadRules(config, vocab_size),
            self.lifecycle,
        )
        evaluations.start(0)

    # --- the two entrances -----------------------------------------------------------------

    def handle(self, peer: str, message: m.Message, now_s: float, key: str = "") -> None:
        """Take in one message of `peer`, which has this key; a message that is out of place is
        answered, not raised."""
        refusal = self._refusal(peer, message, key)
        if refusal is not None:
            self._refuse(peer, refusal)
            self._advance(now_s)
            return
        if isinstance(message, m.Counted):
            state = self.membership.actors[peer]
            state.last_heard_s, state.gone_since_s = now_s, None
            self.lifecycle.ledger.heard(peer, message.counts)
        match message:
            case Join():
                self._on_join(peer, now_s, key)
            case m.Hello():
                self._on_hello(peer, message, now_s, key)
            case _:
                self._handlers[type(message)](peer, message, now_s)
        self._advance(now_s)

    def at_once(self, peer: str, message: m.Message, key: str) -> m.Message | None:
        """The answer to what changes nothing, so that there is nothing to record: to a stranger
        that is not let in, to a supervisor that joins once more, and to that of a rank."""
        if isinstance(message, Join) and self._ending.finish is None:
            index = self.membership.index_of(peer)
            if index is not None:
                return self._accepted(index)
        if self.validator.knows(peer):
            return None
        refusal = self._refusal(peer, message, key)
        if refusal is not None:
            self.validator.refused(peer)
            return m.Rejected(reason=refusal[:MAX_REASON_CHARS])
        if isinstance(message, Join) and message.has_rank:
            return self._accepted(message.rank, self.life)
        return None

    def tick(self, now_s: float, loop_lag_s: float = 0.0) -> None:
        """Passing of time: silent actors, the drain's deadline, rates, a status event."""
        self.loop_lag_s = loop_lag_s
        if loop_lag_s > HELD_UP_S:
            self.membership.not_listened(loop_lag_s)
        for state in self.membership.silent(now_s, self.config.cluster.peer_timeout_s):
            silent_s = now_s - state.last_heard_s
            self.lose(state, f"silent for {silent_s:.0f} s", f"was silent for {silent_s:.0f} s")
        self.forgotten += self.membership.forget_joins(now_s)
        if self.lifecycle.expire(now_s - self.config.buffer.lease_timeout_s):
            text = "leases expired (buffer.lease_timeout_s); their prompts go to others"
            self.warnings.open("leases", text, fleeting=True)
        ledger = self.lifecycle.ledger
        trained = ledger.ends[GroupEnd.TRAINED].tokens
        self.statistics.tokens(now_s, ledger.tokens_generated, trained)
        self._advance(now_s)
        self._diagnose(now_s)
        self._check_stalled(now_s)
        self.emit("status", now_s, {})
        self._close_warnings(now_s)

    def gone(self, peer: str, now_s: float) -> None:
        """A peer has no connection now. It may come back; `tick` loses an actor that does not."""
        state = self.membership.actors.get(peer)
        if state is not None and state.gone_since_s is None:
            state.gone_since_s = now_s

    def refused(self, peer: str, reason: str, now_s: float) -> None:
        """The hub or the conversations have turned this peer away."""
        self._lose_refused(peer, reason)
        self._advance(now_s)

    def begin_attempt(self, life: int, now_s: float) -> None:
        """All processes were started again: of the old ones nobody comes back."""
        self.life = life
        self.ended = False
        for state in self.membership.present():
            self.lose(state, "the run was started again")
        self.membership.begin_attempt()
        self.learner.begin_attempt()
        self._ending = Ending(self.config.cluster)
        self._target_reached = self._stop_asked = False
        self.warnings.close("stop")
        self.snapshot_due = True
        text = f"started again (life {life}) at version {self.policy_version}"
        self.warnings.open("life", text, fleeting=True)
        self.phase = self._present_phase()

    @property
    def policy_version(self) -> int:
        """The newest that was trained."""
        return self.learner.policy_version

    @property
    def warning(self) -> str:
        return self.warnings.text

    @property
    def evaluation_progress(self) -> tuple[int, int] | None:
        """Held-out prompts done and in all; None while none are evaluated."""
        return self._evaluations.progress

    # --- peers -----------------------------------------------------------------------------

    def _on_join(self, peer: str, now_s: float, key: str) -> None:
        if self._ending.finish is not None:
            self.send(peer, m.Rejected(reason="this run is ending"))
            return
        self.send(peer, self._accepted(self.membership.admit(peer, key, now_s)))

    def _accepted(self, index: int, life: int = 0) -> JoinAccepted:
        """`life`: of the run, for one of its ranks."""
        return JoinAccepted(
            index=index,
            config=self.config.model_dump_json(),
            feed_port=self._feed_port,
            incarnation=self.membership.next_incarnation(index, life),
        )

    def _on_hello(self, peer: str, hello: m.Hello, now_s: float, key: str) -> None:
        if hello.role == "learner":
            self.membership.learner = peer
        elif peer not in self.membership.actors:
            for state in self.membership.join(peer, hello, now_s, self.policy_version, key=key):
                self.lose(state, "restarted", "was killed or ended")
            if self.policy_version > 0:
                self.learner.say(m.MembershipChanged(reason=f"{peer} joined"))
        self.send(peer, m.Welcome(policy_version=self.policy_version))
        if self._ending.draining:
            self.send(peer, m.Drain(reason="the run is ending"))

    def _on_failure(self, peer: str, failure: m.Failure, now_s: float) -> None:
        """An actor that came by itself fails for itself; any other role's failure ends the run."""
        withdrawn = self.membership.withdraw(peer)
        if withdrawn is not None:
            for state in withdrawn:
                self.lose(state, "its supervisor gave up")
            text = f"{failure.role} left: {failure.message}"
            self.warnings.open(failure.role, text, fleeting=True)
            return
        reason = str(RoleError(failure.role, failure.message))
        self._diagnose(now_s)
        self._emit_end(now_s, "failed", reason)
        abort = m.Abort(role=failure.role, message=failure.message)
        for state in self.membership.present():
            if state.name != peer:
                self.send(state.name, abort)
        if self.membership.learner != peer:
            self.learner.say(abort)
        self.ended = True

    def fail(self, text: str, now_s: float) -> None:
        """End the run for a reason of the service's own."""
        self._on_failure("", m.Failure(role=ROLE, message=text), now_s)

    def _on_want(self, peer: str, want: m.WantWork, now_s: float) -> None:
        self.membership.actors[peer].want = want.num_prompts

    def _on_report(self, peer: str, report: m.ActorReport, now_s: float) -> None:
        self.membership.actors[peer].gauges = report.gauges
        times_s = {name: report.gauges.get(name, 0.0) for name in ENGINE_TIMES}
        self.lifecycle.ledger.actor(peer).engine_times_s = times_s

    def _on_sample(self, peer: str, sample: m.Sample, now_s: float) -> None:
        """Shown, and nothing else: no count and no decision follows from it."""
        values: dict[str, Value] = {
            "wall_s": round(now_s - self.started_s, 3),
            "policy_version": sample.policy_version,
            "actor": peer,
            "prompt_id": sample.prompt_id,
            "held_out": sample.held_out,
            "decision": sample.decision,
            "reward": sample.reward,
            "extracted": sample.extracted if sample.is_extracted else None,
            "truncated": sample.truncated,
            "num_tokens": sample.num_tokens,
            "prompt": sample.prompt,
            "completion": sample.completion,
        }
        self.events.append(Event(kind="sample", values=values))

    def _on_leaving(self, peer: str, leaving: Leaving, now_s: float) -> None:
        self.membership.actors[peer].leaving = True
        self.send(peer, m.Drain(reason="it was told to stop"))

    def _on_goodbye(self, peer: str, goodbye: m.Goodbye, now_s: float) -> None:
        self.membership.leave(self.membership.actors[peer])
        self.lifecycle.holder_left(peer)

    def _refusal(self, peer: str, message: m.Message, key: str) -> str | None:
        if isinstance(message, m.Hello) and (displaced := self.membership.displaced(message)):
            return displaced
        return self.validator.refusal(
            peer,
            message,
            policy_version=self.policy_version,
            newest_version=max(self.policy_version, self.learner.weight_group.newest_version),
            key=key,
        )

    def _refuse(self, peer: str, reason: str) -> None:
        """Say so once; an actor is lost with it, and its prompts return."""
        self.send(peer, m.Rejected(reason=reason[:MAX_REASON_CHARS]))
        self.validator.refused(peer)
        self._lose_refused(peer, reason)

    def _lose_refused(self, peer: str, reason: str) -> None:
        state = self.membership.actors.get(peer)
        if state is not None and not state.said_goodbye:
            self.lose(state, f"a message of it was refused: {reason}")

    def lose(self, state: ActorState, reason: str, told: str = "") -> None:
        """Give an actor up for dead. `told` says it for people, where `reason` does not."""
        self.membership.lose(state.name, reason)
        self.given_up.append(state.name)
        self.lifecycle.holder_lost(state.name, reason)
        text = f"actor-{state.index} {told or f'is lost: {reason}'}; its supervisor starts it again"
        self.warnings.close(f"weights of {state.name}")
        self.warnings.open(f"actor-{state.index}", text)

    def _close_warnings(self, now_s: float) -> None:
        """An actor that is back is no matter any more. Each warning was in an event by now."""
        for state in self.membership.present():
            if not state.awaits_weights:
                self.warnings.close(f"actor-{state.index}")
        self.warnings.pass_time(now_s)

    # --- results ---------------------------------------------------------------------------

    def _on_group(self, peer: str, message: m.GroupFinished, now_s: float) -> None:
        facts = self.validator.weighed
        assert facts is not None, "a group that the validator has not seen"
        if self._is_leased(peer, message):
            self.diagnoses.evidence.group(facts, now_s)
        self.lifecycle.group_finished(peer, message, facts, self.place)

    def _is_leased(self, peer: str, message: m.GroupFinished | m.ScreenedOut | m.Evaluated) -> bool:
        """Whether this result is the first of its lease."""
        return self.lifecycle.leases.held_by(peer, message.lease_id) is not None

    def _on_screened_out(self, peer: str, message: m.ScreenedOut, now_s: float) -> None:
        if self._is_leased(peer, message):
            self.diagnoses.evidence.screened_out(message, now_s)
        self.lifecycle.screened_out(peer, message)

    def _on_lease_failed(self, peer: str, message: m.LeaseFailed, now_s: float) -> None:
        known = self.lifecycle.unusable.describe()
        lease = self.lifecycle.leases.held_by(peer, message.lease_id)
        if lease is not None:
            training = lease.kind is LeaseKind.TRAINING
            self.diagnoses.evidence.failed(message.reason, training=training)
        whole = self.lifecycle.failed(peer, message)
        unusable = self.lifecycle.unusable.describe()
        if unusable != known:
            self.warnings.open("prompts", unusable)
        if self.lifecycle.is_exhausted and self._ending.finish is None:
            self.fail(self.lifecycle.unusable.describe_exhausted(), now_s)
        elif whole is not None:
            self._evaluation_done(whole, now_s)

    def _on_evaluated(self, peer: str, message: m.Evaluated, now_s: float) -> None:
        if self._is_leased(peer, message):
            self.diagnoses.evidence.evaluated(message, now_s)
        whole = self.lifecycle.evaluated(peer, message)
        if whole is not None:
            self._evaluation_done(whole, now_s)

    def _evaluation_done(self, whole: Accuracy, now_s: float) -> None:
        self._baseline_done = True
        self._evaluated_version = whole.policy_version
        self.statistics.evaluated(whole.accuracy, whole.policy_version)
        self.diagnoses.evaluated(whole.accuracy, whole.num_completions, whole.policy_version)
        self.emit("evaluation", now_s, evaluation_values(whole))
        target = self.config.run.stop_at_accuracy
        if target is not None and whole.accuracy >= target and not self._target_reached:
            self._target_reached = True
            self.learner.say(
                m.TargetReached(accuracy=whole.accuracy, policy_version=whole.policy_version)
            )

    # --- checkpoints and weights -------------------------------------------------------------

    def _on_prepare(self, peer: str, message: m.PrepareCheckpoint, now_s: float) -> None:
        """The shell holds the answer back until the disk has everything up to here."""
        answer = m.JournalDurable(
            policy_version=message.policy_version, service_sequence=self.sequence
        )
        self.send(peer, answer)

    def _on_saved(self, peer: str, saved: m.CheckpointSaved, now_s: float) -> None:
        self.lifecycle.lineage.forget_to(saved.oldest_kept_version)
        self.snapshot_due = True

    def _on_published(self, peer: str, message: m.WeightsPublished, now_s: float) -> None:
        self.learner.published(message)
        if message.error:
            return
        evaluated = self._evaluated_version == message.policy_version  # published once more
        due = self._evaluations.due(message.policy_version) and not evaluated
        if due and self._ending.finish is None:
            self._evaluations.start(message.policy_version)

    def _on_applied(self, peer: str, message: m.WeightsApplied, now_s: float) -> None:
        needs_more = self.learner.applied(peer, message)
        if not message.error:
            self.warnings.close(f"weights of {peer}")
            return
        reason = f"{peer} has not got the weights: {message.error}"
        state = self.membership.actors[peer]
        if message.usable:
            self.warnings.open(f"weights of {peer}", reason)
            if needs_more:
                self.learner.say(m.MembershipChanged(reason=reason))
        else:  # its next incarnation will ask for weights
            self.lose(state, message.error)
            self.warnings.open(f"actor-{state.index}", reason)
        self.emit("status", now_s, {})  # now: a later warning must not hide this one

    def _on_stop_asked(self, peer: str, asked: m.StopAsked, now_s: float) -> None:
        self._stop_asked = True
        self.warnings.open("stop", STOPPING)
        self.phase = self._present_phase()
        self.emit("status", now_s, {})  # now: whoever pressed Ctrl-C waits for an answer

    def _on_finish(self, peer: str, finish: m.FinishRun, now_s: float) -> None:
        self._ending.ask(finish, now_s)
        self.learner.batches.withdraw()

    # --- what follows from the present state -------------------------------------------------

    def _advance(self, now_s: float) -> None:
        """Do whatever has become possible."""
        if self.ended:
            return
        self._advance_ending(now_s)
        self.phase = self._present_phase()
        if not self._ending.draining:
            self._grant(now_s)
        if self._baseline_done:
            evaluating = self._evaluations.target_version is not None
            self.learner.answer_take(now_s, evaluating=evaluating)

    def _diagnose(self, now_s: float) -> None:
        waited_s = self.learner.batches.waited_s(now_s)
        self.diagnoses.look(now_s, self.policy_version, waited_s=waited_s)

    def _check_stalled(self, now_s: float) -> None:
        """A batch that does not come ends the run, with all that is known of why."""
        if not self.learner.batches.stalled(now_s):
            return
        self.learner.batches.withdraw()
        stall_s = self.config.cluster.stall_timeout_s
        text = f"no batch could be filled within {stall_s:.0f} s: {stall_reason(self)}"
        self.fail(f"{ROLE}: {text}", now_s)

    def _advance_ending(self, now_s: float) -> None:
        present = self.membership.present()
        step = self._ending.next_step(
            now_s,
            evaluating_version=self._evaluations.target_version,
            evaluated_version=self._evaluated_version,
            num_present=len(present),
        )
        finish = self._ending.finish
        if finish is None:
            return
        match step:
            case Step.EVALUATE:
                self._evaluations.start(finish.policy_version)
            case Step.DRAIN:
                for state in present:
                    self.send(state.name, m.Drain(reason=finish.reason))
                self._advance_ending(now_s)
            case Step.GIVE_UP:
                for state in present:
                    self.lose(state, "did not drain in time")
                self._advance_ending(now_s)
            case Step.END:
                self._end(finish, now_s)
            case _:
                pass

    def _end(self, finish: m.FinishRun, now_s: float) -> None:
        """The last event and the last message."""
        self._diagnose(now_s)
        outcome, reason = "stopped" if finish.stopped else "completed", finish.reason
        if not finish.stopped and (nothing := self.diagnoses.nothing_learned()):
            outcome, reason = "nothing_learned", nothing
        self._emit_end(now_s, outcome, reason)
        final = self._evaluated_version == finish.policy_version
        fields = summary_values(self, now_s, final_evaluated=final)
        self.learner.say(m.Summary(fields=fields | {"outcome": outcome, "reason": reason}))
        self.ended = True

    def _present_phase(self) -> str:
        if self._ending.draining:
            return "draining"
        if self._stop_asked:
            return "stopping"
        if not self.membership.present():
            return "starting"
        ending = self._ending.finish is not None
        return "evaluating" if ending or not self._baseline_done else "training"

    def _grant(self, now_s: float) -> None:
        version = self.policy_version
        training = self._ending.finish is None
        present = self.membership.present()
        for name, leases in self._grants.next(present, version, now_s, training=training):
            self.send(name, leases)

    # --- out -------------------------------------------------------------------------------

    def send(self, peer: str, message: m.Message) -> None:
        self.outbox.append((peer, message))

    def _emit_end(self, now_s: float, outcome: str, reason: str) -> None:
        ok = outcome == "completed"
        self.warnings.close("stop")
        self.emit("end", now_s, {"ok": ok, "outcome": outcome, "reason": reason})

    def present_status(self, now_s: float) -> Event:
        """What a status event would say now."""
        return Event(kind="status", values=status_values(self, now_s))

    def emit(self, kind: EventKind, now_s: float, values: dict[str, Value]) -> None:
        self.events.append(Event(kind=kind, values=status_values(self, now_s) | values))
