"""One plain ASCII line for each update: what a run prints where there is no terminal."""

from collections.abc import Callable, Mapping
from typing import TextIO

from speed_async.observe.metrics import Event, Value
from speed_async.observe.notation import count, decimal, duration, finite, single_line


class Lines:
    """Writes and flushes a line for a step, an evaluation, the start and the end.

    `status` events are ignored, save that the first event of any kind makes the start line and
    that a new `warning` makes a line of its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started = False
        self._warning: Value = None

    def update(self, event: Event) -> None:
        values = event.values
        if not self._started:
            self._started = True
            self._print(start_line(values))
        warning = values.get("warning")
        if warning and warning != self._warning:
            self._warning = warning
            self._print(f"warning {single_line(warning)}")
        if event.kind in LINE_OF_KIND:
            self._print(LINE_OF_KIND[event.kind](values))

    def _print(self, line: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        # A reason may quote anything; a narrow stream must not end the run over it.
        self._stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


def start_line(values: Mapping[str, Value]) -> str:
    n = _whole_numbers(values)
    return (
        f"start v{n('policy_version')}"
        f" updates {n('updates_total')}"
        f" actors {n('actors_alive')}"
        f" credits {n('credits')}"
        f" buffer {n('buffer_capacity')}"
    )


def step_line(values: Mapping[str, Value]) -> str:
    n = _whole_numbers(values)
    version = n("policy_version")
    lag_s = finite(values.get("loop_lag_s"))
    return (
        f"step {version}/{n('updates_total')} v{version}"
        f" reward {decimal(values.get('reward_mean'), 2)}"
        f" acc {decimal(values.get('accuracy'), 2)}"
        f" gen {n('generated_tokens_per_s')} tok/s"
        f" train {n('trained_tokens_per_s')} tok/s"
        f" accept {decimal(values.get('gate_acceptance'), 2)}"
        f" stale {decimal(values.get('staleness_mean'), 1)}/{n('staleness_max')}"
        f" buffer {n('buffer_groups')}/{n('buffer_capacity')}"
        f" bound {single_line(values.get('bottleneck'))}"
        f" eta {duration(values.get('eta_s'))}"
        + ("" if lag_s is None else f" lag {count(1000 * lag_s)} ms")
        + ("" if values.get("ledger_closes") is not False else " LEDGER DOES NOT CLOSE")
    )


def evaluation_line(values: Mapping[str, Value]) -> str:
    n = _whole_numbers(values)
    return (
        f"evaluation v{n('policy_version')}"
        f" accuracy {decimal(values.get('accuracy'), 3)}"
        f" passed {n('num_passed')}/{n('num_completions')}"
        f" versions {n('oldest_version')}..{n('newest_version')}"
        f" at {duration(values.get('wall_s'))}"
    )


def end_line(values: Mapping[str, Value]) -> str:
    n = _whole_numbers(values)
    outcome = "ok" if values.get("ok") else "failed"
    return (
        f"end {outcome} v{n('policy_version')}"
        f" at {duration(values.get('wall_s'))}: {single_line(values.get('reason'))}"
    )


LINE_OF_KIND = {"step": step_line, "evaluation": evaluation_line, "end": end_line}


def _whole_numbers(values: Mapping[str, Value]) -> Callable[[str], str]:
    return lambda key: decimal(values.get(key), 0)
