"""The gate: selects screened prompts for continuation."""

from dataclasses import dataclass

from speed_async.types import PASS_REWARD


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """Continues a prompt when low < pass rate of its screening samples < high, both strict."""

    low: float
    high: float

    def admits(self, rewards: list[float]) -> bool:
        return self.low < self.pass_rate(rewards) < self.high

    @staticmethod
    def pass_rate(rewards: list[float]) -> float:
        return num_passed(rewards) / len(rewards)


def num_passed(rewards: list[float]) -> int:
    return sum(reward >= PASS_REWARD for reward in rewards)
