"""Plain-text progress output, one ASCII line per update, for output without a terminal."""

from collections.abc import Callable, Mapping
from typing import Literal, TextIO

from speed_async.observability.metrics import Event, Value
from speed_async.observability.notation import (
    count,
    decimal,
    duration,
    finite,
    shortened,
    single_line,
    split_lines,
)
from speed_async.observability.outcomes import identity_of, outcome_of

TEXT_CHARS = 240
"""Maximum characters of a prompt and of a completion."""
ANSWER_CHARS = 60
WAITING_S = 30.0
"""Maximum time between lines."""


class Lines:
    """Writes and flushes a line for the start, each step, each evaluation and the end.

    The first event of any kind prints the start line. Other `status` events print a line only for a
    new warning, and for the start and the end of a diagnosis. Three samples are printed: the first,
    the first one in the second half of the run, and the last.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started = False
        self._warnings: list[str] = []
        self._diagnoses: dict[str, str] = {}
        self._num_samples = 0
        self._sample: Mapping[str, Value] | None = None
        """The latest sample, unless it was printed."""
        self._printed_s: float | None = None
        """`wall_s` of the last progress line."""
        self._is_late = False
        """Whether more than half of the updates are done."""

    def poll(self, silent_s: float) -> Literal["stay", "leave"]:
        """Return "stay": this output handles no keys."""
        return "stay"

    def remember(self, event: Event) -> None:
        """Process an event from before the start of this process; prints evaluations and ends."""
        if event.kind in ("evaluation", "suite", "end"):
            self.update(event)
        elif event.kind == "sample":
            self._sample = event.values

    def update(self, event: Event) -> None:
        values = event.values
        if event.kind == "sample":
            self._handle_sample(values)
            return
        if not self._started:
            self._started = True
            self._print(start_line(values))
        if event.kind in ("status", "step"):
            self._is_late = is_late(values)
            self._print_changes(values)
            self._print_waiting(values)
        if event.kind == "end" and self._sample is not None:
            self._print(sample_line(self._sample))
            self._sample = None
        if event.kind in LINE_OF_KIND:
            self._print(LINE_OF_KIND[event.kind](values))
            self._printed_s = finite(values.get("wall_s"))

    def _print_waiting(self, values: Mapping[str, Value]) -> None:
        """Print a line after WAITING_S without one, to show that the run is alive."""
        wall_s = finite(values.get("wall_s"))
        if wall_s is None:
            return
        if self._printed_s is None or self._printed_s > wall_s:
            self._printed_s = wall_s
        if wall_s - self._printed_s >= WAITING_S:
            self._print(waiting_line(values))
            self._printed_s = wall_s

    def _print_changes(self, values: Mapping[str, Value]) -> None:
        warnings = split_lines(values.get("warning"))
        for warning in warnings:
            if warning not in self._warnings:
                self._print(f"warning {warning}")
        self._warnings = warnings
        if "diagnoses" not in values:
            return
        now = {identity_of(text): text for text in split_lines(values["diagnoses"])}
        for identity, text in now.items():
            if identity not in self._diagnoses:
                self._print(f"diagnosis {text}")
        for identity, text in self._diagnoses.items():
            if identity not in now:
                self._print(f"diagnosis over: {text.partition(':')[0]}")
        self._diagnoses = now

    def _handle_sample(self, values: Mapping[str, Value]) -> None:
        if self._num_samples == 0 or (self._num_samples == 1 and self._is_late):
            self._num_samples += 1
            self._print(sample_line(values))
        else:
            self._sample = values

    def _print(self, line: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        # The text may contain any character; an ASCII-only stream must not raise.
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


def waiting_line(values: Mapping[str, Value]) -> str:
    n = _whole_numbers(values)
    return (
        f"waiting v{n('policy_version')}"
        f" {single_line(values.get('phase'))}"
        f" gen {n('generated_tokens_per_s')} tok/s"
        f" accept {decimal(values.get('gate_acceptance'), 2)}"
        f" buffer {n('buffer_groups')}/{n('buffer_capacity')}"
        f" actors {n('actors_alive')}/{n('actors_total')}"
        f" at {duration(values.get('wall_s'))}"
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
        + ("" if values.get("ledger_closes") is not False else " LEDGER DOES NOT BALANCE")
    )


def evaluation_line(values: Mapping[str, Value]) -> str:
    n = _whole_numbers(values)
    return (
        f"evaluation v{n('policy_version')}"
        f" accuracy {decimal(values.get('accuracy'), 3)}"
        f" passed {n('num_passed')}/{n('num_completions')}"
        + (f" unscored {n('num_unscored')}" if values.get("num_unscored") else "")
        + f" versions {n('oldest_version')}..{n('newest_version')}"
        f" at {duration(values.get('wall_s'))}"
    )


def suite_line(values: Mapping[str, Value]) -> str:
    n = _whole_numbers(values)
    return (
        f"suite {single_line(values.get('suite'))} v{n('policy_version')}"
        f" mean@{n('num_samples')} {decimal(values.get('mean'), 3)}"
        f" versions {n('oldest_version')}..{n('newest_version')}"
        f" truncated {n('num_truncated')}/{n('num_completions')}"
        f" at {duration(values.get('wall_s'))}"
    )


def end_line(values: Mapping[str, Value]) -> str:
    n = _whole_numbers(values)
    outcome = outcome_of(values)
    return (
        f"end {'ok' if outcome == 'completed' else outcome} v{n('policy_version')}"
        f" at {duration(values.get('wall_s'))}: {single_line(values.get('reason'))}"
    )


def sample_line(values: Mapping[str, Value]) -> str:
    n = _whole_numbers(values)
    answer = values.get("extracted")
    extracted = "-" if answer is None else f'"{shortened(answer, ANSWER_CHARS)}"'
    return (
        f"sample v{n('policy_version')} reward {decimal(values.get('reward'), 2)}"
        f" {single_line(values.get('decision'))}"
        + (" TRUNCATED" if values.get("truncated") is True else "")
        + f' prompt "{shortened(values.get("prompt"), TEXT_CHARS)}"'
        f' completion "{shortened(values.get("completion"), TEXT_CHARS)}" extracted {extracted}'
    )


def is_late(values: Mapping[str, Value]) -> bool:
    """Whether more than half of the updates are done."""
    done, total = finite(values.get("policy_version")), finite(values.get("updates_total"))
    return done is not None and total is not None and done > total / 2


LINE_OF_KIND = {
    "step": step_line,
    "evaluation": evaluation_line,
    "suite": suite_line,
    "end": end_line,
}


def _whole_numbers(values: Mapping[str, Value]) -> Callable[[str], str]:
    return lambda key: decimal(values.get(key), 0)
