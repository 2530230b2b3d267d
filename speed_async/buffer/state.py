"""The complete state of the service: one state class for each component, which owns it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from speed_async.buffer.batches import BatchesState
from speed_async.buffer.curriculum.curriculum import CurriculumState, new_curriculum_state
from speed_async.buffer.evaluations import EvaluationState, new_evaluation_states
from speed_async.buffer.handlers.shutdown import ShutdownState
from speed_async.buffer.lifecycle import LifecycleState
from speed_async.buffer.membership import MembershipState
from speed_async.buffer.reporting.diagnoses import DiagnosesState
from speed_async.buffer.reporting.evidence import Evidence
from speed_async.buffer.reporting.statistics import RunStatistics
from speed_async.buffer.reporting.warnings import WarningsState
from speed_async.buffer.reporting.weight_times import WeightTimes
from speed_async.buffer.sessions import SessionsState
from speed_async.buffer.weight_group import WeightGroupState
from speed_async.config.schema import Config


@dataclass(kw_only=True, slots=True)
class ServiceState:
    attempt: int = 0
    """Attempt number: how often this run was restarted."""
    phase: str = "starting"
    ended: bool = False
    target_reached: bool = False
    """The learner was told in this attempt that the accuracy reached `run.stop_at_accuracy`."""
    loop_lag_s: float | None = None
    """Delay of the last tick; None before the first."""
    curriculum: CurriculumState
    evaluations: dict[str, EvaluationState]
    """By suite."""
    diagnoses: DiagnosesState
    statistics: RunStatistics
    shutdown: ShutdownState = field(default_factory=ShutdownState)
    batches: BatchesState = field(default_factory=BatchesState)
    weight_group: WeightGroupState = field(default_factory=WeightGroupState)
    lifecycle: LifecycleState = field(default_factory=LifecycleState)
    membership: MembershipState = field(default_factory=MembershipState)
    warnings: WarningsState = field(default_factory=WarningsState)
    weight_times: WeightTimes = field(default_factory=WeightTimes)


@dataclass(kw_only=True, slots=True)
class MachineState:
    service: ServiceState
    sessions: SessionsState = field(default_factory=SessionsState)
    last_s: float = 0.0
    """Time of the last input."""


def new_state(
    config: Config, num_prompts: int, suite_sizes: Mapping[str, int], started_s: float
) -> ServiceState:
    """The state of a new run with these numbers of prompts, for training and of each suite, whose
    first evaluations have begun."""
    evidence = Evidence(max_reward_ranges=2 * config.learner.groups_per_update)
    return ServiceState(
        curriculum=new_curriculum_state(config, num_prompts),
        diagnoses=DiagnosesState(evidence=evidence),
        evaluations=new_evaluation_states(config.evaluate, suite_sizes),
        statistics=RunStatistics.begin(started_s),
    )
