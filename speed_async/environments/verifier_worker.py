"""The side of the verifier pool that runs in a worker process. Imports stay light: no torch."""

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
from speed_async.types import Prompt, Verdict

MakeTask = Callable[[], Task]
Reply = list[Verdict] | str
"""Verdicts, or what went wrong. Foreign exceptions never travel: they may not unpickle."""

MAX_ERROR_CHARS = 1000
"""Of a foreign error's text, which may hold a whole completion."""
MAX_EXTRACTED_CHARS = 1000
"""Of what a completion was taken to answer: people look at it, nothing else does."""
_PR_SET_PDEATHSIG = 1
_NOT_STARTED = "worker was not initialised"

# What this process scores with; a pool's initializer has no other way to hand it to its calls.
_worker_task: Task | str = _NOT_STARTED


def start_worker(make: MakeTask) -> None:
    """Initializer of a worker: makes its task once. A failure is kept for the first call."""
    global _worker_task
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler waits for C code to return
    _die_with_parent()
    try:
        _worker_task = make()
    except BaseException as error:
        _worker_task = describe(error)


def report_start() -> str:
    """Empty when this worker has its task, else why not."""
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
        except BaseException as error:  # some libraries derive their time-outs from BaseException
            return f"raised {describe(error)}"
        if not _is_reward(reward):
            return f"returned {_shown(reward)}, which is not a finite number in [0, 1]"
        if extracted is not None and not isinstance(extracted, str):
            return f"extracted {_shown(extracted)}, which is neither a text nor None"
        shown = None if extracted is None else str(extracted[:MAX_EXTRACTED_CHARS])
        verdicts.append(Verdict(reward=float(reward), extracted=shown))
    return verdicts


def describe(error: BaseException) -> str:
    if isinstance(error, SpeedAsyncError):
        return str(error)
    return f"{type(error).__name__}: {_text(error)}"


def _text(error: BaseException) -> str:
    try:
        return str(error)[:MAX_ERROR_CHARS]
    except Exception:  # a foreign class may break its own text
        return "(it has no text)"


def _is_reward(reward: object) -> TypeGuard[float]:
    return _is_number(reward) and math.isfinite(reward) and 0.0 <= reward <= 1.0


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float | np.integer | np.floating)


def _shown(value: object) -> str:
    return repr(value)[:80] if _is_number(value) else f"a {type(value).__name__}"


def _die_with_parent() -> None:
    """A worker that hangs cannot notice that its pool's process is gone; the kernel can."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = parent_process()
    if parent is not None and parent.pid != os.getppid():  # it died before the line above
        os._exit(1)
