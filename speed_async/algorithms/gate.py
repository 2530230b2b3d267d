"""The gate: selects screened prompts for continuation."""

from speed_async.config.schema import GateConfig


def admits(gate: GateConfig, num_passed: int, num_screening: int) -> bool:
    """Whether low < pass rate of the screening completions < high, both strict."""
    return gate.low < num_passed / num_screening < gate.high
