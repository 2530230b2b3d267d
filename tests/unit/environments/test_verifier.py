"""The verifier pool with real processes: verifiers that hang, raise or die, and valid calls."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from speed_async.actors.rollout import Scorer
from speed_async.environments.rewards import MAX_EXTRACTED_CHARS, Rewards, error_text
from speed_async.environments.suite_task import SuiteTask
from speed_async.environments.verifier import MAX_FAILED_CALLS, VerifierPool
from speed_async.errors import DataError, TaskError
from speed_async.testing.scripted_verifier import ScriptedVerifier
from speed_async.types import Prompt
from tests.fakes.faulty_task import HANGS_S, FaultyTask, make_faulty, prompt
from tests.fakes.paths import REPOSITORY

LIMIT_S = 240.0
T = TypeVar("T")


def make_failing() -> FaultyTask:
    raise DataError("data file 'x.jsonl' does not exist: correct task.path")


def make_exiting() -> FaultyTask:
    os._exit(5)


def make_hanging() -> FaultyTask:
    time.sleep(HANGS_S)
    raise AssertionError


def make_once(marker: Path) -> FaultyTask:
    """Creates one file for every process that calls it."""
    (marker / str(os.getpid())).touch()
    return FaultyTask()


class MathLoaded(SuiteTask):
    """Its extracted answer is whether math-verify is imported."""

    def extract(self, completion: str) -> str:
        return str("math_verify" in sys.modules)


def run(scenario: Callable[[], Coroutine[object, object, T]]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(LIMIT_S):
            return await scenario()

    return asyncio.run(bounded())


async def rewards(pool: Scorer, scored: Prompt, completions: Sequence[str]) -> list[float]:
    return [verdict.reward for verdict in await pool.score(scored, completions)]


async def failure(pool: Scorer, scored: Prompt, completion: str = "x") -> str:
    """Outcome and error of a completion without a reward."""
    [verdict] = await pool.score(scored, [completion])
    assert math.isnan(verdict.reward) and not verdict.passed
    return f"{verdict.outcome}: {verdict.error}"


async def broken(pool: Scorer, scored: Prompt) -> str:
    with pytest.raises(TaskError) as caught:
        await pool.score(scored, ["x"])
    return str(caught.value)


def has_exited(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def has_text(path: Path) -> bool:
    return path.exists() and path.read_text() != ""


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.01)


def test_one_call_scores_all_completions() -> None:
    async def scenario() -> None:
        async with VerifierPool(make_faulty, 1, 5.0) as pool:
            assert await rewards(pool, prompt("sum"), ["7", "8", "", "7"]) == [1.0, 0.0, 0.0, 1.0]
            assert await rewards(pool, prompt("sum"), []) == []

    run(scenario)


def test_each_failure_is_reported_and_the_pool_recovers() -> None:
    expected = {
        "raise": "error: raised ValueError: cannot parse this",
        "raise timeout": "error: raised LibraryTimeout: too slow",
        "system exit": "error: raised SystemExit: 2",
        "two": "error: returned 2.0, which is not a finite number in [0, 1]",
        "nan": "returned nan, which is not",
        "none": "returned a NoneType, which is not",
        "exit": "error: ended its worker process (exit code 3)",
    }

    async def scenario() -> None:
        async with VerifierPool(make_faulty, 1, 5.0) as pool:
            for fault, text in expected.items():
                assert text in await failure(pool, prompt(fault, prompt_id=4))
                assert await rewards(pool, prompt("sum"), ["7"]) == [1.0]

    run(scenario)


def test_extracted_answers_are_returned_and_truncated() -> None:
    async def scenario() -> None:
        async with VerifierPool(make_faulty, 1, 5.0) as pool:
            verdicts = await pool.score(prompt("sum"), ["7", "it is 8", "", "y" * 5000])
        assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 0.0, 0.0]
        assert [verdict.extracted for verdict in verdicts] == [
            "7",
            "8",
            None,
            "y" * MAX_EXTRACTED_CHARS,
        ]

    run(scenario)


def test_failing_extraction_fails_only_its_call() -> None:
    expected = {
        "raise in extract": "raised ValueError: cannot extract from this",
        "hang in extract": "did not return within 1 s",
        "exit in extract": "ended its worker process (exit code 4)",
        "extract a number": "extracted 7, which is neither a string nor None",
    }

    async def scenario() -> None:
        async with VerifierPool(make_faulty, 1, 1.0) as pool:
            for completion, text in expected.items():
                assert text in await failure(pool, prompt("sum"), completion)
                assert await rewards(pool, prompt("sum"), ["7"]) == [1.0]

    run(scenario)


def test_hanging_call_fails_and_queued_calls_are_scored() -> None:
    async def scenario() -> None:
        async with VerifierPool(make_faulty, 1, 0.5) as pool:
            hanging = asyncio.create_task(failure(pool, prompt("hang", prompt_id=9)))
            await asyncio.sleep(0)  # first in the queue
            good = [rewards(pool, prompt("sum"), ["7", "1"]) for _ in range(20)]
            assert await asyncio.gather(*good) == [[1.0, 0.0]] * 20
            text = await hanging
        assert text.startswith("timeout: did not return within 0.5 s")
        assert "actors.verifier_timeout_s" in text

    run(scenario)


def test_hang_in_c_code_is_killed_at_its_timeout() -> None:
    async def scenario() -> float:
        async with VerifierPool(make_faulty, 1, 0.4) as pool:
            started_s = time.monotonic()
            await failure(pool, prompt("hang in C"))
            return time.monotonic() - started_s

    assert 0.4 <= run(scenario) < 2.4


def test_other_workers_continue_while_one_hangs() -> None:
    async def scenario() -> None:
        async with VerifierPool(make_faulty, 2, 30.0) as pool:
            hanging = asyncio.create_task(pool.score(prompt("hang"), ["x"]))
            await asyncio.sleep(0)
            for _ in range(50):
                assert await rewards(pool, prompt("sum"), ["7"]) == [1.0]
            assert not hanging.done()
            hanging.cancel()
            with pytest.raises(asyncio.CancelledError):
                await hanging

    run(scenario)


def test_event_loop_is_not_blocked_while_a_worker_is_replaced() -> None:
    async def scenario() -> float:
        async with VerifierPool(make_faulty, 1, 0.8) as pool:
            scoring = asyncio.create_task(failure(pool, prompt("hang")))
            lag_s = 0.0
            while not scoring.done():
                started_s = time.monotonic()
                await asyncio.sleep(0.005)
                lag_s = max(lag_s, time.monotonic() - started_s - 0.005)
            await pool.score(prompt("sum"), ["7"])
            return lag_s

    assert run(scenario) < 0.5


def test_killed_idle_worker_is_replaced(tmp_path: Path) -> None:
    written = tmp_path / "pid"

    async def scenario() -> None:
        async with VerifierPool(make_faulty, 1, 5.0) as pool:
            await pool.score(prompt("pid", str(written)), ["x"])
            first = int(written.read_text())
            os.kill(first, signal.SIGKILL)
            await asyncio.to_thread(wait_until, partial(has_exited, first))
            await pool.score(prompt("pid", str(written)), ["x"])
            assert int(written.read_text()) != first

    run(scenario)


def test_worker_creates_its_task_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with VerifierPool(partial(make_once, tmp_path), 1, 5.0) as pool:
            for _ in range(5):
                await pool.score(prompt("sum"), ["7"])

    run(scenario)
    assert len(list(tmp_path.iterdir())) == 1
    assert not (tmp_path / str(os.getpid())).exists()


def test_worker_imports_the_library_of_its_task_before_the_first_call() -> None:
    async def scenario() -> None:
        async with VerifierPool(partial(MathLoaded, "math"), 1, 60.0) as pool:
            [verdict] = await pool.score(prompt("2 + 3", answer="5"), [r"\boxed{5}"])
            assert verdict.passed and verdict.extracted == "True"

    run(scenario)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (make_failing, "could not start: data file 'x.jsonl' does not exist: correct task.path"),
        (make_exiting, "could not start: its worker process exited during start"),
        (make_hanging, "could not start: no worker created its task within 1 s"),
        (lambda: FaultyTask(), "is not picklable"),
    ],
)
def test_task_that_cannot_be_created_fails_the_start(
    make: Callable[[], FaultyTask], text: str
) -> None:
    async def scenario() -> str:
        limit_s = 1.0 if make is make_hanging else 20.0
        with pytest.raises(TaskError) as caught:
            async with VerifierPool(make, 1, 5.0, start_timeout_s=limit_s):
                pass
        return str(caught.value)

    assert text in run(scenario)


def test_closing_fails_pending_calls_and_stops_all_processes(tmp_path: Path) -> None:
    written = tmp_path / "pid"

    async def scenario() -> None:
        async with VerifierPool(make_faulty, 1, 30.0) as pool:
            hanging = asyncio.create_task(broken(pool, prompt("pid and hang", str(written))))
            queued = asyncio.create_task(broken(pool, prompt("sum")))
            await asyncio.to_thread(wait_until, partial(has_text, written))
        assert "was closed" in await hanging
        assert "was closed" in await queued
        assert has_exited(int(written.read_text()))
        assert "not open" in await broken(pool, prompt("sum"))

    run(scenario)


def test_hanging_worker_exits_with_its_killed_parent(tmp_path: Path) -> None:
    written = tmp_path / "pid"
    program = (
        "import asyncio, sys\n"
        "from tests.fakes.faulty_task import make_faulty, prompt\n"
        "from speed_async.environments.verifier import VerifierPool\n"
        "async def main():\n"
        "    async with VerifierPool(make_faulty, 1, 60.0) as pool:\n"
        "        await pool.score(prompt('pid and hang', sys.argv[1]), ['x'])\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, str(script), str(written)], env=environment)
    try:
        wait_until(partial(has_text, written), limit_s=30.0)
    finally:
        parent.kill()
        parent.wait(timeout=10)
    wait_until(partial(has_exited, int(written.read_text())))


def test_worker_does_not_import_torch() -> None:
    program = (
        "import sys, speed_async.environments.verifier, speed_async.environments.registry, "
        "speed_async.environments.jsonl, speed_async.environments.gym\n"
        "print([m for m in ('torch', 'transformers', 'reasoning_gym') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True
    )
    assert output.stdout.strip() == "[]"


def test_error_with_broken_str_is_described() -> None:
    class BrokenStr(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    assert error_text(BrokenStr()) == "BrokenStr: (no error text)"


def test_an_error_leaves_only_its_completion_without_a_reward() -> None:
    verdicts = Rewards(FaultyTask()).verdicts(prompt("sum"), ["7", "raise in extract", "8"])
    assert [verdict.outcome for verdict in verdicts] == ["scored", "error", "scored"]
    assert [verdict.passed for verdict in verdicts] == [True, False, False]


@pytest.mark.parametrize(
    ("fault", "outcome"), [("hang in extract", "timeout"), ("exit in extract", "error")]
)
def test_completions_beside_a_hanging_or_fatal_one_are_scored(fault: str, outcome: str) -> None:
    async def scenario() -> None:
        async with VerifierPool(make_faulty, 1, 1.0) as pool:
            verdicts = await pool.score(prompt("sum"), ["7", fault, "8", "7"])
        assert [each.outcome for each in verdicts] == ["scored", outcome, "scored", "scored"]
        assert [each.passed for each in verdicts] == [True, False, False, True]

    run(scenario)


def test_few_calls_are_made_when_all_completions_hang() -> None:
    async def scenario() -> None:
        async with VerifierPool(make_faulty, 1, 0.3) as pool:
            verdicts = await pool.score(prompt("hang"), [str(number) for number in range(30)])
        assert {verdict.outcome for verdict in verdicts} == {"timeout"}
        texts = [verdict.error for verdict in verdicts]
        assert all(text.startswith("did not return") for text in texts[:MAX_FAILED_CALLS])
        assert all(text.startswith("was not tried") for text in texts[MAX_FAILED_CALLS:])

    run(scenario)


def test_scripted_verifier_uses_its_function_and_records_calls() -> None:
    scripted = ScriptedVerifier(lambda prompt, completion: float(completion == prompt.answer))
    assert asyncio.run(rewards(scripted, prompt("sum"), ["7", "8"])) == [1.0, 0.0]
    assert [call.completions for call in scripted.calls] == [("7", "8")]
    assert scripted.calls[0].prompt.answer == "7"
