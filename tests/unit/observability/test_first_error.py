"""Root cause of a failure in a log: recorded logs of vLLM, and processes that die in the test."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from speed_async.actors.stepped_engine.process import ProcessWorker
from speed_async.environments.verifier import VerifierPool
from speed_async.errors import IncarnationLost, TaskError
from speed_async.launcher.exit_status import describe
from speed_async.observability.first_error import (
    LogSince,
    first_error,
    is_secondary_error,
    one_line,
)
from tests.fakes.paths import FAKES

LOGS = FAKES / "logs"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "vllm_stray_weights.log",
            "ValueError: Attempted to load nested weight 'lm_head.weight.exp_avg' into a single "
            "parameter 'lm_head.weight'",
        ),
        (
            "vllm_two_workers.log",
            "ValueError: Attempted to load nested weight 'lm_head.weight.exp_avg' into a single "
            "parameter 'lm_head.weight'",
        ),
        (
            "vllm_no_kv_memory.log",
            "ValueError: No available memory for the cache blocks. Try increasing "
            "`gpu_memory_utilization` when initializing the engine (this flag also controls CPU "
            "memory reservation on the CPU backend, despite its name). See "
            "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details.",
        ),
    ],
)
def test_root_cause_of_a_recorded_failure_is_found(log: str, expected: str) -> None:
    assert first_error((LOGS / log).read_text()) == expected


def test_errors_that_only_refer_to_other_errors_are_skipped() -> None:
    trace = "Traceback (most recent call last):\n  File 'x.py', line 1, in f\n    g()\n"
    referring = trace + "RuntimeError: Engine core initialization failed. See root cause above.\n"
    assert first_error(referring) == ""
    assert first_error(f"{referring}\n{trace}MemoryError\n") == "MemoryError"
    assert is_secondary_error("EngineDeadError: See stack trace (above) for the root cause.")
    assert is_secondary_error("RuntimeError: please check the stack trace above for the root cause")


def test_log_without_a_traceback_has_no_error() -> None:
    assert first_error("") == ""
    assert first_error("INFO 11-29 01:57:14 [core.py:1] ready\nERROR: from a library\n") == ""
    assert first_error("Traceback (most recent call last):\n  File 'cut off") == ""


def test_multiline_message_is_joined_and_truncated() -> None:
    log = (
        "Traceback (most recent call last):\n  File 'x'\nValueError: first\n  second\n\nafter it\n"
    )
    assert first_error(log) == "ValueError: first second"
    assert one_line("a\n b" + "x" * 500, 20) == "a b" + "x" * 14 + "..."
    text = describe("actor-1", KeyError("x\n" * 50_000))
    assert len(text) < 2100
    assert "\n" not in text


def test_only_lines_written_since_the_start_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    trace = "Traceback (most recent call last):\n  File 'x'\n"
    log.write_text(f"{trace}ValueError: from an earlier actor\n")
    since = LogSince(log)
    assert since.first_error() == ""
    with log.open("a") as file:
        file.write(f"{trace}KeyError: 'new'\n")
    assert since.first_error() == "KeyError: 'new'"
    log.unlink()
    assert since.first_error() == ""


def test_stderr_that_is_not_a_file_is_not_read() -> None:
    """Reading a terminal or a pipe would block forever."""
    code = (
        "from speed_async.observability.first_error import LogSince\n"
        "print([LogSince().first_error()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout == "['']\n"


# --- processes that die -----------------------------------------------------------------------


class FailsToUnpickle:
    """Cannot be unpickled: the process that receives it dies with a traceback."""

    def __call__(self) -> Any:
        raise AssertionError("unreachable")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return partial(exec, "raise OSError('the disk with the model is gone')"), ()


@contextmanager
def stderr_in(path: Path) -> Iterator[None]:
    """Redirect stderr to a file, as actors do."""
    before = os.dup(2)
    with path.open("ab") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def test_error_of_a_dead_engine_process_contains_its_root_cause(tmp_path: Path) -> None:
    async def run() -> None:
        worker = ProcessWorker(FailsToUnpickle(), load_timeout_s=60.0, fork=False)
        try:
            await worker.start()
        finally:
            await worker.close()

    with (
        stderr_in(tmp_path / "log"),
        pytest.raises(
            IncarnationLost, match=r"died \(exit status 1\): OSError: the disk with the model"
        ),
    ):
        asyncio.run(run())


def test_error_of_a_dead_verifier_contains_its_root_cause(tmp_path: Path) -> None:
    async def run() -> None:
        async with VerifierPool(FailsToUnpickle(), 1, 5.0):
            pass

    with (
        stderr_in(tmp_path / "log"),
        pytest.raises(
            TaskError, match="exited during start: OSError: the disk with the model is gone"
        ),
    ):
        asyncio.run(run())
