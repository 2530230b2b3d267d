"""Shutdown of a run: final evaluation, drain, Goodbye messages.

This module decides only; ending.py acts on the decisions.
"""

from dataclasses import dataclass
from enum import Enum, auto

from speed_async.buffer.batches import NOTICES_PER_TIMEOUT
from speed_async.buffer.evaluations import Evaluations
from speed_async.config.sections.cluster import ClusterConfig
from speed_async.transport.messages import EvaluationPending, FinishRun


class ShutdownStep(Enum):
    TRAIN = auto()
    """No shutdown was requested."""
    WAIT = auto()
    EVALUATE = auto()
    """Start the evaluation of the final version."""
    DRAIN = auto()
    """Send Drain to every actor (returned once)."""
    GIVE_UP = auto()
    """Declare lost the actors that did not drain in time."""
    END = auto()


@dataclass(kw_only=True, slots=True)
class ShutdownState:
    stop_asked: bool = False
    """The user asked to stop; `finish` follows."""
    finish: FinishRun | None = None
    """The learner's request; None before it."""
    draining: bool = False
    since_s: float = 0.0
    """Time of the request or of the last new token since, then of the drain."""
    tokens: int = 0
    """Tokens generated until `since_s`, before the drain."""
    told_s: float = 0.0
    """When the learner was last told that the evaluation makes progress."""


class Shutdown:
    def __init__(self, config: ClusterConfig, state: ShutdownState) -> None:
        self._config = config
        self._state = state

    @property
    def finish(self) -> FinishRun | None:
        return self._state.finish

    @property
    def stop_asked(self) -> bool:
        return self._state.stop_asked

    @property
    def draining(self) -> bool:
        return self._state.draining

    def ask_stop(self) -> None:
        self._state.stop_asked = True

    def request(self, finish: FinishRun, now_s: float) -> None:
        self._state.finish, self._state.since_s, self._state.told_s = finish, now_s, now_s

    def cancel(self) -> None:
        state = self._state
        state.stop_asked, state.finish, state.draining = False, None, False

    def next_step(
        self,
        now_s: float,
        *,
        evaluations: Evaluations,
        num_present: int,
        tokens_generated: int,
    ) -> ShutdownStep:
        """The next step of the shutdown. DRAIN also advances this state. The last evaluation ends
        without a result after `stall_timeout_s` without a new token."""
        if self.finish is None:
            return ShutdownStep.TRAIN
        if not self.draining:
            version = self.finish.policy_version
            unevaluated = self.finish.evaluate and not evaluations.are_complete(version)
            if tokens_generated > self._state.tokens:
                self._state.tokens, self._state.since_s = tokens_generated, now_s
            if unevaluated and now_s - self._state.since_s < self._config.stall_timeout_s:
                can_start = evaluations.can_start(version)
                return ShutdownStep.EVALUATE if can_start else ShutdownStep.WAIT
            self._state.draining, self._state.since_s = True, now_s
            return ShutdownStep.DRAIN
        if num_present == 0:
            return ShutdownStep.END
        waited_s = now_s - self._state.since_s
        return (
            ShutdownStep.GIVE_UP if waited_s > self._config.drain_timeout_s else ShutdownStep.WAIT
        )

    def pending(self, now_s: float) -> list[EvaluationPending]:
        """Tells the learner, several times within its own deadline, that the last evaluation
        runs."""
        interval_s = self._config.stall_timeout_s / NOTICES_PER_TIMEOUT
        is_evaluating = self.finish is not None and self.finish.evaluate and not self.draining
        if not is_evaluating or now_s - self._state.told_s < interval_s:
            return []
        self._state.told_s = now_s
        return [EvaluationPending()]
