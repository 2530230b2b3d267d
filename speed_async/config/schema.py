"""The configuration: one frozen tree, with one file per section in config/sections/.

Units are in the names; derived values are properties.
"""

from typing import Literal

from speed_async.config.sections.actors import ActorsConfig
from speed_async.config.sections.buffer import BufferConfig
from speed_async.config.sections.cluster import ClusterConfig
from speed_async.config.sections.curriculum import CurriculumConfig
from speed_async.config.sections.evaluate import EvaluateConfig
from speed_async.config.sections.gate import GateConfig
from speed_async.config.sections.learner import LearnerConfig
from speed_async.config.sections.model import ModelConfig
from speed_async.config.sections.objective import ObjectiveConfig
from speed_async.config.sections.observe import ObserveConfig
from speed_async.config.sections.run import RunConfig
from speed_async.config.sections.section import Section
from speed_async.config.sections.task import TaskConfig
from speed_async.config.sections.weights import WeightsConfig

Algorithm = Literal[
    "rloo",
    "grpo",
    "dr-grpo",
    "reinforce++",
    "cispo",
    "gspo",
    "dapo",
    "speed-rloo",
    "speed-dapo",
]
MIN_CAPACITY_GROUPS = 256


class Config(Section):
    algorithm: Algorithm = "rloo"
    """Preset of `gate`, `objective` and the size of a batch (config/presets.py)."""
    run: RunConfig = RunConfig()
    model: ModelConfig
    task: TaskConfig
    gate: GateConfig = GateConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    actors: ActorsConfig = ActorsConfig()
    buffer: BufferConfig = BufferConfig()
    learner: LearnerConfig = LearnerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    observe: ObserveConfig = ObserveConfig()

    def sampling(self, suite: str) -> tuple[float, float]:
        """Temperature and top-p for this suite; that of training if it is empty."""
        for each in self.evaluate.suites:
            if each.name == suite:
                return each.temperature, each.top_p
        return self.actors.temperature, 1.0

    @property
    def capacity_groups(self) -> int:
        """Maximum number of buffered groups."""
        return self.buffer.capacity_groups or max(MIN_CAPACITY_GROUPS, self.max_credits)

    @property
    def takes_by_signal(self) -> bool:
        """Whether groups of the same version are trained in the order of p(1 - p)."""
        if self.buffer.order == "auto":
            return self.gate.mode != "off"
        return self.buffer.order == "signal"

    @property
    def max_credits(self) -> int:
        """Maximum number of groups that are leased, buffered or in training: one batch per version
        in the staleness window, so that no group has to become stale."""
        if self.buffer.credits is not None:
            return self.buffer.credits
        return (self.buffer.max_staleness + 1) * self.learner.groups_per_update
