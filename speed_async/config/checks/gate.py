"""Checks of the gate, and of what it leaves for training."""

from collections.abc import Iterator

from speed_async.config.schema import Config
from speed_async.config.sections.gate import GateConfig
from speed_async.config.sections.objective import ACROSS_GROUPS
from speed_async.errors import ConfigError


def check_gate(config: Config) -> Iterator[ConfigError]:
    gate = config.gate
    yield from _check_baseline(config)
    if gate.group_size < 2 and config.curriculum.kind == "posterior":
        yield ConfigError(
            "curriculum.kind",
            "posterior",
            "it selects prompts whose completions have different rewards, and a group has one; "
            "set 'uniform', or gate.n_init = 2 or more",
        )
    can_pass = not (errors := list(_check_band(config)))
    yield from errors
    if config.objective.screening_samples == "unbiased" and can_pass and not _trains_any(gate):
        yield ConfigError(
            "objective.screening_samples",
            "unbiased",
            f"with gate.mode = '{gate.mode}', {gate.num_screening} screening completions and a "
            f"pass rate between gate.low = {gate.low} and gate.high = {gate.high}, every sample of "
            "an admitted group is pivotal, so training would use none; widen the band, raise "
            "gate.n_init, or set 'all'",
        )


def _check_band(config: Config) -> Iterator[ConfigError]:
    """Errors of a gate that no prompt could pass, or of groups that could teach nothing."""
    gate, num_seen = config.gate, config.gate.num_screening
    needs_two = gate.mode != "off" or config.objective.advantage not in ACROSS_GROUPS
    if gate.group_size < 2 and needs_two:
        yield ConfigError(
            "gate.n_cont",
            gate.n_cont,
            f"with gate.n_init = {gate.n_init} a group has a single completion and no baseline; "
            "set n_init + n_cont to 2 or more, or gate.mode = 'off' and objective.advantage = "
            "'shrunken', whose baseline is the other groups of the update",
        )
    elif gate.mode == "screen" and gate.n_cont == 0:
        yield ConfigError(
            "gate.n_cont",
            gate.n_cont,
            "the gate would continue no prompt; set 1 or more, gate.mode = 'filter', or "
            "algorithm = 'speed-rloo' instead of gate.mode",
        )
    if gate.low >= gate.high:
        yield ConfigError("gate.low", gate.low, f"must be below gate.high = {gate.high}")
    elif (
        num_seen
        and gate.group_size > 1
        and not any(gate.admits(k, num_seen) for k in range(num_seen + 1))
    ):
        yield ConfigError(
            "gate.n_init",
            gate.n_init,
            f"no pass rate k/{num_seen} lies strictly between gate.low = {gate.low} and "
            f"gate.high = {gate.high} (gate.mode = '{gate.mode}'), so no prompt can pass; raise "
            "gate.n_init (at least 2) or widen the band",
        )


def _check_baseline(config: Config) -> Iterator[ConfigError]:
    if config.objective.advantage != "shrunken":
        return
    if config.learner.groups_per_update < 2:
        yield ConfigError(
            "learner.groups_per_update",
            config.learner.groups_per_update,
            "objective.advantage = 'shrunken' compares groups of one update; set 2 or more, or "
            "objective.advantage = 'rloo'",
        )
    if config.gate.mode == "off" and config.takes_by_signal:
        yield ConfigError(
            "buffer.order",
            config.buffer.order,
            "with objective.advantage = 'shrunken' and gate.mode = 'off', groups of equal rewards "
            "have a gradient, and this order would train them last; set 'arrival'",
        )


def _trains_any(gate: GateConfig) -> bool:
    """Whether an admitted group can have a sample that `unbiased` keeps: one of the continuation,
    or a screening sample that is not pivotal."""
    num_seen = gate.num_screening
    if num_seen < gate.group_size:
        return True
    return any(
        not gate.is_pivotal(k, num_seen, passed=passed)
        for k in range(num_seen + 1)
        if gate.admits(k, num_seen)
        for passed, count in ((True, k), (False, num_seen - k))
        if count
    )
