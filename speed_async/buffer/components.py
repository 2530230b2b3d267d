"""The components of the service that hold state. Its handlers share them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from speed_async.buffer.batches import Batches
from speed_async.buffer.curriculum.curriculum import Curriculum, make_curriculum
from speed_async.buffer.evaluations import Evaluations
from speed_async.buffer.lifecycle import Lifecycle
from speed_async.buffer.membership import Membership
from speed_async.buffer.reporting.diagnoses import Diagnoses
from speed_async.buffer.reporting.statistics import RunStatistics
from speed_async.buffer.reporting.warnings import Warnings
from speed_async.buffer.reporting.weight_times import WeightTimes
from speed_async.buffer.state import ServiceState
from speed_async.buffer.weight_group import WeightGroup
from speed_async.config.schema import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    config: Config
    membership: Membership
    statistics: RunStatistics
    diagnoses: Diagnoses
    curriculum: Curriculum
    evaluations: Evaluations
    lifecycle: Lifecycle
    batches: Batches
    weight_group: WeightGroup
    warnings: Warnings
    """Current warnings for the user."""
    weight_times: WeightTimes

    @classmethod
    def build(
        cls,
        config: Config,
        state: ServiceState,
        *,
        num_prompts: int,
        suite_sizes: Mapping[str, int],
    ) -> Self:
        """`suite_sizes`: number of prompts of each suite. Raises JournalError if the state does not
        fit the configuration."""
        statistics = state.statistics
        membership = Membership(config.cluster, state.membership)
        curriculum = make_curriculum(config, num_prompts, state.curriculum)
        evaluations = Evaluations(config.evaluate, suite_sizes, state.evaluations)
        lifecycle = Lifecycle(
            config,
            curriculum=curriculum,
            evaluations=evaluations,
            statistics=statistics,
            state=state.lifecycle,
        )
        return cls(
            config=config,
            membership=membership,
            statistics=statistics,
            diagnoses=Diagnoses(config, statistics, state.diagnoses),
            curriculum=curriculum,
            evaluations=evaluations,
            lifecycle=lifecycle,
            batches=Batches(config, lifecycle, membership, state.batches),
            weight_group=WeightGroup(membership, state.weight_group),
            warnings=Warnings(state.warnings),
            weight_times=state.weight_times,
        )
