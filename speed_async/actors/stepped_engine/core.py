"""The synchronous engine core: iterates a stepper, in a thread or in another process.

Requests and commands of callers collect in an input. One iteration applies it, runs one
step and returns the results. Inputs and results are plain records, so that they can cross a
process boundary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from speed_async.actors.engine import EngineStats, GenerationRequest, UpdateReport
from speed_async.actors.stepped_engine.admission import ModelLimits
from speed_async.actors.stepped_engine.stepper import FinishedRequest, Stepper
from speed_async.errors import SpeedAsyncError
from speed_async.types import WeightOffer

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadWeights:
    offer: WeightOffer


@dataclass(frozen=True, kw_only=True, slots=True)
class Pause:
    abort: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    pass


Command = LoadWeights | Pause | Resume
Answer = UpdateReport | SpeedAsyncError | None


@dataclass(frozen=True, kw_only=True, slots=True)
class IterationInput:
    """Requests and commands since the start of the last iteration."""

    arrivals: list[tuple[int, GenerationRequest]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.arrivals or self.cancelled or self.commands)


@dataclass(frozen=True, kw_only=True, slots=True)
class IterationResult:
    """Results of one or more iterations; `stats` are those after the last one."""

    finished: list[FinishedRequest]
    answers: list[Answer]
    """One result per command, in order. An error is raised in the command's caller only."""
    tokens_cancelled: int
    stats: EngineStats

    def followed_by(self, later: "IterationResult") -> "IterationResult":
        return IterationResult(
            finished=self.finished + later.finished,
            answers=self.answers + later.answers,
            tokens_cancelled=self.tokens_cancelled + later.tokens_cancelled,
            stats=later.stats,
        )


class EngineCore:
    """Iterates a stepper. Not thread-safe."""

    def __init__(self, stepper: Stepper, *, clock: Clock = time.monotonic) -> None:
        self._stepper = stepper
        self._clock = clock
        self._is_paused = False
        self._sampling_s = self._updating_s = 0.0

    @property
    def limits(self) -> ModelLimits:
        return self._stepper.limits

    @property
    def has_work(self) -> bool:
        """Whether an iteration with an empty input would sample."""
        return self._stepper.has_work and not self._is_paused

    @property
    def stats(self) -> EngineStats:
        return replace(
            self._stepper.stats(), sampling_s=self._sampling_s, updating_s=self._updating_s
        )

    def iterate(self, inputs: IterationInput) -> IterationResult:
        """Apply the input and run one step.

        Raises the stepper's errors, and the error of an update that left no valid version.
        """
        stepper = self._stepper
        finished: list[FinishedRequest] = []
        answers: list[Answer] = []
        for key, request in inputs.arrivals:
            stepper.submit(key, request)
        tokens_cancelled = sum(stepper.cancel(key) for key in inputs.cancelled)
        started_s = self._clock()
        for command in inputs.commands:
            try:
                answers.append(self._execute(command, finished))
            except SpeedAsyncError as error:
                if not stepper.has_valid_weights:
                    raise
                answers.append(error)
        stepping_s = self._clock()
        if self.has_work:
            finished += stepper.step()
        self._updating_s += stepping_s - started_s
        self._sampling_s += self._clock() - stepping_s
        return IterationResult(
            finished=finished,
            answers=answers,
            tokens_cancelled=tokens_cancelled,
            stats=self.stats,
        )

    def _execute(self, command: Command, finished: list[FinishedRequest]) -> UpdateReport | None:
        match command:
            case LoadWeights(offer=offer):
                started_s = self._clock()
                finished += self._stepper.abort_stale(offer.policy_version)
                transfer_s = self._stepper.load_weights(offer)
                return UpdateReport(
                    policy_version=offer.policy_version,
                    transfer_s=transfer_s,
                    pause_s=self._clock() - started_s,
                )
            case Pause(abort=abort):
                self._is_paused = True
                if abort:
                    finished += self._stepper.abort()
            case Resume():
                self._is_paused = False
        return None
