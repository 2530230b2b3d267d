"""Progress of an evaluation without a terminal."""

import io

from rich.console import Console

from speed_async.evaluation.records import SampleRecord
from speed_async.launcher.evaluation.progress import SuiteProgress


def record(prompt_id: int) -> SampleRecord:
    return SampleRecord(
        prompt_id=prompt_id,
        sample=0,
        level="",
        num_tokens=5,
        finish_reason="stop",
        outcome="scored",
        reward=1.0,
        passed=True,
        extracted="7",
        answer="7",
        text="7",
    )


def test_without_a_terminal_the_first_and_the_last_line_are_whole_and_tell_the_counts() -> None:
    out = io.StringIO()
    name = "a-suite-with-a-long-name/" * 4
    times_s = iter([10.0, 11.0, 12.0, 12.0])
    progress = SuiteProgress(
        Console(file=out), name, num_present=0, num_total=2, clock=lambda: next(times_s)
    )
    with progress:
        for prompt_id in range(2):
            progress.add(record(prompt_id))
    assert out.getvalue().splitlines() == [
        f"{name}: 0 of 2 samples",
        f"{name}: 2 of 2 samples, 5 tokens/s, 100.0 % passed",
    ]
