"""The buffer service as a pure state machine: messages in, messages and events out.

It touches no socket, clock or file: `handle` and `tick` are given the time, and their results
wait in `outbox` and `events` for the shell (server.py) to send.

consumes   messages of actors and of the learner
waits for  nothing
answers    a TakeBatch when enough fresh groups are buffered and the first evaluation is done;
           a FinishRun when the last evaluation is done and every actor said goodbye
"""

from collections.abc import Callable

from speed_async.buffer.batches import Batches
from speed_async.buffer.curriculum import Curriculum
from speed_async.buffer.ending import Ending, Step
from speed_async.buffer.gatekeeper import Gatekeeper
from speed_async.buffer.grants import Grants
from speed_async.buffer.inspection import Inspection
from speed_async.buffer.lifecycle import Accuracy, Evaluations, Lifecycle
from speed_async.buffer.membership import ActorState, Membership
from speed_async.buffer.statistics import RunStatistics, UpdateTimes
from speed_async.buffer.status import (
    evaluation_values,
    stall_reason,
    status_values,
    summary_values,
)
from speed_async.buffer.weight_group import WeightGroup
from speed_async.buffer.weight_times import WeightTimes
from speed_async.config.schema import Config
from speed_async.errors import RoleError
from speed_async.observe.metrics import Event, EventKind, Value
from speed_async.types import GroupEnd
from speed_async.wire import messages as m
from speed_async.wire.groups import batch_group
from speed_async.wire.joining import Join, JoinAccepted, Leaving

ROLE = "buffer service"
MAX_REASON_CHARS = 500


class BufferService:
    def __init__(
        self,
        config: Config,
        *,
        curriculum: Curriculum,
        evaluations: Evaluations,
        fingerprint: str,
        started_s: float,
        feed_port: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self.outbox: list[tuple[str, m.Message]] = []
        self.events: list[Event] = []
        self.ended = False
        """Everything was said; the shell may flush and leave."""
        self.phase = "starting"
        self.policy_version = 0
        self.config = config
        self.started_s = started_s
        self.membership = Membership(config.cluster)
        self.weight_group = WeightGroup(self.membership)
        self.weight_times = WeightTimes()
        self.statistics = RunStatistics(started_s)
        self.lifecycle = Lifecycle(
            config, curriculum=curriculum, evaluations=evaluations, statistics=self.statistics
        )
        self.loop_lag_s = 0.0
        self.warning = ""
        """The latest thing a person should know of."""
        self._evaluations = evaluations
        self._baseline_done = False
        self._batches = Batches(config, self.lifecycle, self.statistics)
        self._grants = Grants(config, self.lifecycle, self._batches, evaluations)
        self._feed_port = feed_port
        self._target_reached = False
        self._ending = Ending(config.cluster)
        self._evaluated_version: int | None = None
        self._handlers: dict[type[m.Message], Callable[..., None]] = {
            Join: self._on_join,
            m.Hello: self._on_hello,
            m.Failure: self._on_failure,
            m.WantWork: self._on_want,
            m.GroupFinished: self._on_group,
            m.ScreenedOut: self._on_screened_out,
            m.LeaseFailed: self._on_lease_failed,
            m.Evaluated: self._on_evaluated,
            m.ActorReport: self._on_report,
            m.WeightsApplied: self._on_applied,
            Leaving: self._on_leaving,
            m.Goodbye: self._on_goodbye,
            m.TakeBatch: self._on_take,
            m.Trained: self._on_trained,
            m.PublishWeights: self._on_publish,
            m.WeightsPublished: self._on_published,
            m.FinishRun: self._on_finish,
        }
        self.gatekeeper = Gatekeeper(
            self.membership,
            fingerprint,
            self._handlers.keys(),
            Inspection(config, vocab_size),
            self.lifecycle,
        )
        evaluations.start(0)

    # --- the two entrances -----------------------------------------------------------------

    def handle(self, peer: str, message: m.Message, now_s: float) -> None:
        """Take in one message of `peer`; a message that is out of place is answered, not raised."""
        newest_version = max(self.policy_version, self.weight_group.newest_version)
        refusal = self.gatekeeper.refusal(peer, message, newest_version)
        if refusal is not None:
            self._refuse(peer, refusal)
            self._advance(now_s)
            return
        if isinstance(message, m.Counted):
            self.membership.actors[peer].last_heard_s = now_s
            self.lifecycle.ledger.heard(peer, message.counts)
        self._handlers[type(message)](peer, message, now_s)
        self._advance(now_s)

    def tick(self, now_s: float, loop_lag_s: float = 0.0) -> None:
        """Passing of time: silent actors, the drain's deadline, rates, a status event."""
        self.loop_lag_s = loop_lag_s
        for state in self.membership.silent(now_s, self.config.cluster.peer_timeout_s):
            self._lose(state, f"silent for {self.config.cluster.peer_timeout_s:.0f} s")
        ledger = self.lifecycle.ledger
        trained = ledger.ends[GroupEnd.TRAINED].tokens
        self.statistics.tokens(now_s, ledger.tokens_generated, trained)
        self._advance(now_s)
        self._check_stalled(now_s)
        self._emit("status", now_s, {})

    def unreachable(self, peer: str, reason: str) -> None:
        """A peer takes no messages any more. For an actor that is death; a learner may recover."""
        state = self.membership.actors.get(peer)
        if state is not None and not state.said_goodbye:
            self._lose(state, reason)

    # --- peers -----------------------------------------------------------------------------

    def _on_join(self, peer: str, join: Join, now_s: float) -> None:
        if self._ending.finish is not None:
            self._send(peer, m.Rejected(reason="this run is ending"))
            return
        accepted = JoinAccepted(
            index=self.membership.admit(peer),
            config=self.config.model_dump_json(),
            feed_port=self._feed_port,
        )
        self._send(peer, accepted)

    def _on_hello(self, peer: str, hello: m.Hello, now_s: float) -> None:
        if hello.role == "learner":
            self.membership.learner = peer
        elif peer not in self.membership.actors:
            for state in self.membership.join(peer, hello, now_s, self.policy_version):
                self._lose(state, "restarted")
            if self.policy_version > 0:
                self._send_learner(m.MembershipChanged(reason=f"{peer} joined"))
        self._send(peer, m.Welcome(policy_version=self.policy_version))
        if self._ending.draining:
            self._send(peer, m.Drain(reason="the run is ending"))

    def _on_failure(self, peer: str, failure: m.Failure, now_s: float) -> None:
        """An actor that came by itself fails for itself; any other role's failure ends the run."""
        withdrawn = self.membership.withdraw(peer)
        if withdrawn is not None:
            for state in withdrawn:
                self._lose(state, "its supervisor gave up")
            self.warning = f"{failure.role} left: {failure.message}"
            return
        reason = str(RoleError(failure.role, failure.message))
        self._emit("end", now_s, {"ok": False, "reason": reason})
        abort = m.Abort(role=failure.role, message=failure.message)
        for state in self.membership.present():
            if state.name != peer:
                self._send(state.name, abort)
        if self.membership.learner != peer:
            self._send_learner(abort)
        self.ended = True

    def _on_want(self, peer: str, want: m.WantWork, now_s: float) -> None:
        self.membership.actors[peer].want = want.num_prompts

    def _on_report(self, peer: str, report: m.ActorReport, now_s: float) -> None:
        self.membership.actors[peer].gauges = report.gauges

    def _on_leaving(self, peer: str, leaving: Leaving, now_s: float) -> None:
        self.membership.actors[peer].leaving = True
        self._send(peer, m.Drain(reason="it was told to stop"))

    def _on_goodbye(self, peer: str, goodbye: m.Goodbye, now_s: float) -> None:
        self.membership.leave(self.membership.actors[peer])
        self.lifecycle.holder_left(peer)

    def _refuse(self, peer: str, reason: str) -> None:
        """Say so once; an actor is lost with it, and its prompts return."""
        self._send(peer, m.Rejected(reason=reason[:MAX_REASON_CHARS]))
        self.gatekeeper.refused(peer)
        state = self.membership.actors.get(peer)
        if state is not None and not state.said_goodbye:
            self._lose(state, f"a message of it was refused: {reason}")

    def _lose(self, state: ActorState, reason: str) -> None:
        self.membership.lose(state.name, reason)
        self.lifecycle.holder_lost(state.name)
        self.warning = f"{state.name} lost: {reason}"

    # --- results ---------------------------------------------------------------------------

    def _on_group(self, peer: str, message: m.GroupFinished, now_s: float) -> None:
        refusal = self.lifecycle.group_finished(peer, message)
        self._send(peer, m.Ack(lease_id=message.lease_id))
        if refusal is not None:
            self._refuse(peer, refusal)

    def _on_screened_out(self, peer: str, message: m.ScreenedOut, now_s: float) -> None:
        self.lifecycle.screened_out(peer, message)
        self._send(peer, m.Ack(lease_id=message.lease_id))

    def _on_lease_failed(self, peer: str, message: m.LeaseFailed, now_s: float) -> None:
        whole = self.lifecycle.failed(peer, message)
        self._send(peer, m.Ack(lease_id=message.lease_id))
        if whole is not None:
            self._evaluation_done(whole, now_s)

    def _on_evaluated(self, peer: str, message: m.Evaluated, now_s: float) -> None:
        whole = self.lifecycle.evaluated(peer, message)
        self._send(peer, m.Ack(lease_id=message.lease_id))
        if whole is not None:
            self._evaluation_done(whole, now_s)

    def _evaluation_done(self, whole: Accuracy, now_s: float) -> None:
        self._baseline_done = True
        self._evaluated_version = whole.policy_version
        self.statistics.evaluated(whole.accuracy)
        self._emit("evaluation", now_s, evaluation_values(whole))
        target = self.config.run.stop_at_accuracy
        if target is not None and whole.accuracy >= target and not self._target_reached:
            self._target_reached = True
            self._send_learner(
                m.TargetReached(accuracy=whole.accuracy, policy_version=whole.policy_version)
            )

    # --- the learner -----------------------------------------------------------------------

    def _on_take(self, peer: str, take: m.TakeBatch, now_s: float) -> None:
        self._batches.ask(take, now_s)

    def _on_trained(self, peer: str, message: m.Trained, now_s: float) -> None:
        self.lifecycle.trained(message)
        self.policy_version = message.policy_version
        metrics = message.metrics
        self.statistics.updated(
            UpdateTimes(
                wait_s=metrics.get("time/wait_s", 0.0),
                starved_s=self._batches.starved_s,
                train_s=metrics.get("time/train_s", 0.0),
                sync_s=metrics.get("time/sync_s", 0.0),
            )
        )
        self.weight_times.stepped(self.policy_version, self.membership.present())
        self._emit("step", now_s, dict(metrics))

    def _on_publish(self, peer: str, publish: m.PublishWeights, now_s: float) -> None:
        self.weight_times.began(now_s)
        offers, members = self.weight_group.form(publish)
        for name, offer in offers:
            self._send(name, offer)
        self._send_learner(members)

    def _on_published(self, peer: str, message: m.WeightsPublished, now_s: float) -> None:
        self.weight_times.ended(message)
        for state in self.weight_group.published(message):
            self._lose(state, f"it held up the weights: {message.error}")
        if message.error:
            return
        evaluated = self._evaluated_version == message.policy_version  # published once more
        due = self._evaluations.due(message.policy_version) and not evaluated
        if due and self._ending.finish is None:
            self._evaluations.start(message.policy_version)

    def _on_applied(self, peer: str, message: m.WeightsApplied, now_s: float) -> None:
        self.weight_times.applied(message)
        state = self.membership.actors[peer]
        needs_more = self.weight_group.applied(state, message)
        if not message.error:
            return
        reason = f"{peer} has not got the weights: {message.error}"
        if not message.usable:  # its next incarnation will ask for weights
            self._lose(state, message.error)
        elif needs_more:
            self._send_learner(m.MembershipChanged(reason=reason))
        self.warning = reason
        self._emit("status", now_s, {})  # now: a later warning must not hide this one

    def _on_finish(self, peer: str, finish: m.FinishRun, now_s: float) -> None:
        self._ending.ask(finish, now_s)
        self._batches.withdraw()

    # --- what follows from the present state -------------------------------------------------

    def _advance(self, now_s: float) -> None:
        """Do whatever has become possible."""
        if self.ended:
            return
        self._advance_ending(now_s)
        self.phase = self._present_phase()
        if not self._ending.draining:
            self._grant()
        self._answer_take(now_s)

    def _check_stalled(self, now_s: float) -> None:
        """A batch that does not come ends the run, with all that is known of why."""
        if starving := self._batches.newly_starving(now_s):
            self.warning = starving
        if not self._batches.stalled(now_s):
            return
        self._batches.withdraw()
        stall_s = self.config.cluster.stall_timeout_s
        text = f"no batch could be filled within {stall_s:.0f} s: {stall_reason(self)}"
        self._on_failure("", m.Failure(role=ROLE, message=f"{ROLE}: {text}"), now_s)

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
                    self._send(state.name, m.Drain(reason=finish.reason))
                self._advance_ending(now_s)
            case Step.GIVE_UP:
                for state in present:
                    self._lose(state, "did not drain in time")
                self._advance_ending(now_s)
            case Step.END:
                self._emit("end", now_s, {"ok": True, "reason": finish.reason})
                final = self._evaluated_version == finish.policy_version
                fields = summary_values(self, now_s, final_evaluated=final)
                self._send_learner(m.Summary(fields=fields))
                self.ended = True
            case _:
                pass

    def _present_phase(self) -> str:
        if self._ending.draining:
            return "draining"
        if not self.membership.present():
            return "starting"
        ending = self._ending.finish is not None
        return "evaluating" if ending or not self._baseline_done else "training"

    def _grant(self) -> None:
        training = self._ending.finish is None
        present = self.membership.present()
        for name, leases in self._grants.next(present, self.policy_version, training=training):
            self._send(name, leases)

    def _answer_take(self, now_s: float) -> None:
        if not self._baseline_done:
            return
        evaluating = self._evaluations.target_version is not None
        answer = self._batches.answer(now_s, evaluating=evaluating)
        if answer is None:
            return
        if self.warning == self._batches.starving:
            self.warning = ""
        take, groups = answer
        for group in groups:
            self._send_learner(batch_group(group.message))
        lease_ids = [group.lease_id for group in groups]
        self._send_learner(m.BatchReady(policy_version=take.policy_version, lease_ids=lease_ids))

    # --- out -------------------------------------------------------------------------------

    def _send(self, peer: str, message: m.Message) -> None:
        self.outbox.append((peer, message))

    def _send_learner(self, message: m.Message) -> None:
        if self.membership.learner is not None:
            self.outbox.append((self.membership.learner, message))

    def _emit(self, kind: EventKind, now_s: float, values: dict[str, Value]) -> None:
        self.events.append(Event(kind=kind, values=status_values(self, now_s) | values))
