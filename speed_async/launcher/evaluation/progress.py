"""Progress of an evaluation, with the time left: bars on a terminal, else a line now and then."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from speed_async.evaluation.records import SampleRecord

LINE_INTERVAL_S = 30.0


class SuiteProgress(AbstractContextManager):
    """Counts the samples of one suite. `num_present` were made by an earlier process."""

    def __init__(
        self,
        console: Console,
        name: str,
        *,
        num_present: int,
        num_total: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._name = name
        self._clock = clock
        self._num_present, self._num_done, self._num_total = num_present, num_present, num_total
        self._num_scored = self._num_passed = self._num_tokens = 0
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=120.0,
        )
        self._task = self._bars.add_task(name, total=num_total, completed=num_present, rate="")

    def __enter__(self) -> Self:
        self._started_s = self._shown_s = self._clock()
        if self._console.is_terminal:
            self._bars.start()
        else:
            self._print_line()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bars.stop()
        elif self._num_done > self._num_present:
            self._print_line(self._rate(self._clock()))

    def add(self, record: SampleRecord) -> None:
        self._num_done += 1
        self._num_tokens += record.num_tokens
        self._num_scored += record.outcome == "scored"
        self._num_passed += record.passed
        now_s = self._clock()
        rate = self._rate(now_s)
        if self._console.is_terminal:
            self._bars.update(self._task, completed=self._num_done, rate=rate)
        elif now_s - self._shown_s >= LINE_INTERVAL_S:
            self._shown_s = now_s
            left = timedelta(seconds=round(self._left_s(now_s)))
            self._print_line(rate, f"{left} left")

    def _print_line(self, *facts: str) -> None:
        done = f"{self._name}: {self._num_done:,} of {self._num_total:,} samples"
        self._console.print(", ".join((done, *facts)), highlight=False, soft_wrap=True)

    def _rate(self, now_s: float) -> str:
        elapsed_s = max(now_s - self._started_s, 1e-3)
        passed = f"{100 * self._num_passed / self._num_scored:.1f} %" if self._num_scored else "-"
        return f"{self._num_tokens / elapsed_s:,.0f} tokens/s, {passed} passed"

    def _left_s(self, now_s: float) -> float:
        num_made = self._num_done - self._num_present
        return (now_s - self._started_s) * (self._num_total - self._num_done) / max(1, num_made)
