"""The worker-process side of the verifier pool. Imports stay light: no torch."""

import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing import parent_process

from speed_async.config.sections.task import RewardConfig
from speed_async.environments.rewards import Rewards, error_text
from speed_async.environments.task import Task
from speed_async.types import Verdict

MakeTask = Callable[[], Task]
Reply = list[Verdict] | str
"""Verdicts, or why the worker cannot score anything. Third-party exceptions are not sent: they may
not unpickle."""

_PR_SET_PDEATHSIG = 1
_NOT_STARTED = "worker was not initialised"

# Those of this process. A global, because a pool's initializer cannot pass values to its calls.
_worker_rewards: Rewards | str = _NOT_STARTED


def start_worker(make: MakeTask, chosen: Sequence[RewardConfig]) -> None:
    """Initializer of a worker: creates its task and rewards once, and imports what scoring needs,
    which would count against the time limit of the first call. That call reports an error."""
    global _worker_rewards
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler cannot run during C code
    _die_with_parent()
    try:
        task = make()
        getattr(task, "warm_up", _nothing_to_warm_up)()
        _worker_rewards = Rewards(task, chosen)
    except BaseException as error:
        _worker_rewards = error_text(error)


def _nothing_to_warm_up() -> None:
    """Of a task without the optional method."""


def report_start() -> str:
    """Empty when this worker has its task and rewards, else the error."""
    return _worker_rewards if isinstance(_worker_rewards, str) else ""


def score_packed(payload: bytes) -> Reply:
    """Verdicts on a pickled (prompt, completions)."""
    if isinstance(_worker_rewards, str):
        return f"could not start: {_worker_rewards}"
    prompt, completions = pickle.loads(payload)
    return _worker_rewards.verdicts(prompt, completions)


def _die_with_parent() -> None:
    """Let the kernel kill this worker when its parent exits; a hanging worker cannot detect it."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = parent_process()
    if parent is not None and parent.pid != os.getppid():  # the parent died before the call above
        os._exit(1)
