"""The worker-process side of the verifier pool. Imports stay light: no torch."""

import ctypes
import math
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing import parent_process
from typing import TypeGuard

import numpy as np

from speed_async.environments.task import Task
from speed_async.errors import SpeedAsyncError
from speed_async.types import PASS_REWARD, Prompt, Verdict

MakeTask = Callable[[], Task]
Reply = list[Verdict] | str
"""Verdicts, or an error text. Third-party exceptions are not sent: they may not unpickle."""

MAX_ERROR_CHARS = 1000
"""Maximum length of a third-party error text, which may quote a whole completion."""
MAX_EXTRACTED_CHARS = 1000
"""Maximum length of an extracted answer, which is used for display only."""
_PR_SET_PDEATHSIG = 1
_NOT_STARTED = "worker was not initialised"

# The task of this process. A global, because a pool's initializer cannot pass values to its calls.
_worker_task: Task | str = _NOT_STARTED


def start_worker(make: MakeTask) -> None:
    """Initializer of a worker: creates its task once. An error is reported by the first call."""
    global _worker_task
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler cannot run during C code
    _die_with_parent()
    try:
        _worker_task = make()
    except BaseException as error:
        _worker_task = error_text(error)


def report_start() -> str:
    """Empty when this worker has its task, else the error."""
    return _worker_task if isinstance(_worker_task, str) else ""


def score_packed(payload: bytes) -> Reply:
    """Verdicts on a pickled (prompt, completions)."""
    if isinstance(_worker_task, str):
        return f"could not start: {_worker_task}"
    prompt, completions = pickle.loads(payload)
    return score_all(_worker_task, prompt, completions)


def score_all(task: Task, prompt: Prompt, completions: Sequence[str]) -> Reply:
    """One verdict for each completion, or the first failure."""
    verdicts: list[Verdict] = []
    for completion in completions:
        try:
            reward: object = task.score(prompt, completion)
            extracted: object = task.extract(completion)
        except BaseException as error:  # some libraries derive their timeouts from BaseException
            return f"raised {error_text(error)}"
        if not _is_reward(reward):
            return f"returned {_shown_result(reward)}, which is not a finite number in [0, 1]"
        if extracted is not None and not isinstance(extracted, str):
            return f"extracted {_shown_result(extracted)}, which is neither a string nor None"
        excerpt = None if extracted is None else str(extracted[:MAX_EXTRACTED_CHARS])
        verdicts.append(
            Verdict(reward=float(reward), passed=reward >= PASS_REWARD, extracted=excerpt)
        )
    return verdicts


def error_text(error: BaseException) -> str:
    if isinstance(error, SpeedAsyncError):
        return str(error)
    try:
        text = str(error)[:MAX_ERROR_CHARS]
    except Exception:  # a third-party __str__ may raise
        text = "(no error text)"
    return f"{type(error).__name__}: {text}"


def _is_reward(reward: object) -> TypeGuard[float]:
    return _is_number(reward) and math.isfinite(reward) and 0.0 <= reward <= 1.0


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float | np.integer | np.floating)


def _shown_result(value: object) -> str:
    return repr(value)[:80] if _is_number(value) else f"a {type(value).__name__}"


def _die_with_parent() -> None:
    """Let the kernel kill this worker when its parent exits; a hanging worker cannot detect it."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = parent_process()
    if parent is not None and parent.pid != os.getppid():  # the parent died before the call above
        os._exit(1)
