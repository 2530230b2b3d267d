"""How a run ends: by request, after the final evaluation and a drain, or with a failure.

Shutdown decides the steps; Ending turns them into effects and emits the end event.
"""

from speed_async.buffer.components import Components
from speed_async.buffer.handlers.effects import Effects, Loss, began_messages
from speed_async.buffer.handlers.shutdown import Shutdown, ShutdownState, ShutdownStep
from speed_async.buffer.reporting.status import stall_reason, summary_fields
from speed_async.buffer.validation import MessageValidator
from speed_async.errors import RoleError
from speed_async.observability.metrics import EventKind, Value
from speed_async.observability.summary import STOPPING
from speed_async.transport import messages as m

ROLE = "buffer service"


class Ending:
    def __init__(
        self, components: Components, validator: MessageValidator, state: ShutdownState
    ) -> None:
        self._parts = components
        self._validator = validator
        self._shutdown = Shutdown(components.config.cluster, state)

    @property
    def is_requested(self) -> bool:
        """Whether the learner has asked to finish the run."""
        return self._shutdown.finish is not None

    @property
    def is_draining(self) -> bool:
        return self._shutdown.draining

    def begin_attempt(self) -> None:
        """All processes were restarted: nothing asks for the end any more."""
        self._shutdown.cancel()
        self._parts.warnings.close("stop")

    def ask_stop(self) -> None:
        """The user asked to stop; the learner requests the end after its update."""
        self._shutdown.ask_stop()
        self._parts.warnings.open("stop", STOPPING)

    def request(self, finish: m.FinishRun, now_s: float) -> None:
        self._shutdown.request(finish, now_s)
        self._parts.batches.cancel()

    @property
    def phase(self) -> str:
        """The phase of the run."""
        if self.is_draining:
            return "draining"
        if self._shutdown.stop_asked:
            return "stopping"
        if not self._parts.membership.present():
            return "starting"
        evaluated = self._parts.evaluations.held_out.evaluated_version is not None
        return "evaluating" if self.is_requested or not evaluated else "training"

    def next(self, now_s: float, *, attempt: int) -> Effects | None:
        """The next step of a requested end; None while it waits."""
        finish = self._shutdown.finish
        if finish is None:
            return None
        present = self._parts.membership.present()
        step = self._shutdown.next_step(
            now_s,
            evaluations=self._parts.evaluations,
            num_present=len(present),
            tokens_generated=self._parts.lifecycle.ledger.tokens_generated,
        )
        match step:
            case ShutdownStep.EVALUATE:
                started = self._parts.evaluations.start_missing(finish.policy_version)
                return Effects(to_learner=began_messages(started))
            case ShutdownStep.DRAIN:
                drain = m.Drain(reason=finish.reason)
                return Effects(messages=[(state.name, drain) for state in present])
            case ShutdownStep.GIVE_UP:
                reason = "did not drain in time"
                return Effects(lost=[Loss(state=state, reason=reason) for state in present])
            case ShutdownStep.END:
                final = self._parts.evaluations.held_out.evaluated_version == finish.policy_version
                return self._finished(finish, now_s, attempt=attempt, final_evaluated=final)
            case _:
                pass
        return None

    def pending(self, now_s: float) -> list[m.EvaluationPending]:
        """Notices to a learner that waits for the last evaluation."""
        return self._shutdown.pending(now_s)

    def failed(self, peer: str, failure: m.Failure, now_s: float) -> Effects:
        """A failure that `peer` reported ends the run. The other members abort."""
        self._diagnose(now_s)
        abort = m.Abort(role=failure.role, message=failure.message)
        others = [state.name for state in self._parts.membership.present() if state.name != peer]
        return Effects(
            messages=[(name, abort) for name in others],
            to_learner=[abort] if self._parts.membership.learner != peer else [],
            events=[self._end_event("failed", str(RoleError(failure.role, failure.message)))],
            ended=True,
        )

    def check_stalled(self, now_s: float) -> str:
        """Update the diagnoses. Returns why the run fails if a batch makes no progress, and an
        empty text otherwise."""
        self._diagnose(now_s)
        parts = self._parts
        what = parts.batches.stalled(now_s, is_starting=not parts.lifecycle.ledger.actors)
        if not what:
            return ""
        waited_s = parts.batches.waited_s(now_s) or 0.0
        parts.batches.cancel()
        reason = stall_reason(parts)
        return f"{ROLE}: no batch could be filled within {waited_s:.0f} s: {what}: {reason}"

    def _finished(
        self, finish: m.FinishRun, now_s: float, *, attempt: int, final_evaluated: bool
    ) -> Effects:
        self._diagnose(now_s)
        outcome, reason = "stopped" if finish.stopped else "completed", finish.reason
        if not finish.stopped and (nothing := self._parts.diagnoses.nothing_learned()):
            outcome, reason = "nothing_learned", nothing
        fields = summary_fields(
            self._parts,
            self._validator,
            now_s,
            attempt=attempt,
            final_evaluated=final_evaluated,
        )
        message = m.Summary(fields=fields | {"outcome": outcome, "reason": reason})
        return Effects(to_learner=[message], events=[self._end_event(outcome, reason)], ended=True)

    def _end_event(self, outcome: str, reason: str) -> tuple[EventKind, dict[str, Value]]:
        self._parts.warnings.close("stop")
        return "end", {"ok": outcome == "completed", "outcome": outcome, "reason": reason}

    def _diagnose(self, now_s: float) -> None:
        waited_s = self._parts.batches.waited_s(now_s)
        self._parts.diagnoses.evaluate(
            now_s, self._parts.lifecycle.groups.policy_version, waited_s=waited_s
        )
