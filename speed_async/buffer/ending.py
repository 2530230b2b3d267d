"""How a run ends: last evaluation, drain, goodbye. Pure decisions; service.py acts on them."""

from enum import Enum, auto

from speed_async.config.schema import ClusterConfig
from speed_async.transport.messages import FinishRun


class Step(Enum):
    TRAIN = auto()
    """No end was asked for."""
    WAIT = auto()
    EVALUATE = auto()
    """Start the last version's evaluation."""
    DRAIN = auto()
    """Tell every actor to drain (decided once)."""
    GIVE_UP = auto()
    """The actors still here did not drain in time."""
    END = auto()


class Ending:
    def __init__(self, config: ClusterConfig) -> None:
        self.finish: FinishRun | None = None
        self.draining = False
        self._config = config
        self._since_s = 0.0

    def ask(self, finish: FinishRun, now_s: float) -> None:
        self.finish, self._since_s = finish, now_s

    def next_step(
        self,
        now_s: float,
        *,
        evaluating_version: int | None,
        evaluated_version: int | None,
        num_present: int,
    ) -> Step:
        """What is to be done now; DRAIN also moves this state on."""
        if self.finish is None:
            return Step.TRAIN
        waited_s = now_s - self._since_s
        if not self.draining:
            wanted = self.finish.evaluate and evaluated_version != self.finish.policy_version
            if wanted and waited_s < self._config.stall_timeout_s:
                return Step.EVALUATE if evaluating_version is None else Step.WAIT
            self.draining, self._since_s = True, now_s
            return Step.DRAIN
        if num_present == 0:
            return Step.END
        return Step.GIVE_UP if waited_s > self._config.drain_timeout_s else Step.WAIT
