"""The public functions of the package: `import speed_async as sa`."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed_async.config.extensions import F, register
from speed_async.config.load import load_config, save_config
from speed_async.config.schema import Config
from speed_async.errors import SpeedAsyncError


def train(config: Config | str | Path, *overrides: str) -> dict[str, Any]:
    """Train on this machine as `speed-async train` does, and return the run's summary.

    Args:
        config: a configuration, or the path of a TOML file.
        overrides: with a path, overrides such as "--learner.lr", "1e-4".

    Returns: the content of summary.json in the run folder (docs/getting-started.md). Its
    `outcome` is "completed", "stopped" or "nothing_learned", its `run_folder` the folder.
    Raises ConfigError for an invalid configuration and SpeedAsyncError when the run fails.
    """
    from speed_async.launcher.exit_status import EXIT_INTERRUPTED, EXIT_NOTHING_LEARNED
    from speed_async.launcher.run_folder import numbered

    if not isinstance(config, Config):
        config = load_config(config, overrides)
    wanted = Path(config.run.folder).expanduser().resolve()
    run_folder = next(each for each in numbered(wanted) if _is_free(each))
    run = config.run.model_copy(update={"folder": str(run_folder)})
    with tempfile.TemporaryDirectory(prefix="speed_async-") as folder:
        path = Path(folder) / "resolved.json"
        save_config(config.model_copy(update={"run": run}), path)
        # In a process of its own, which owns signals and event loops.
        status = subprocess.run(
            [sys.executable, "-m", "speed_async", "train", str(path)]
        ).returncode
    if status not in (0, EXIT_NOTHING_LEARNED, EXIT_INTERRUPTED):  # those write a summary
        raise SpeedAsyncError(
            f"the run in '{run_folder}' failed with status {status}: its last line on standard "
            "error has the reason"
        )
    return json.loads((run_folder / "summary.json").read_text())


def _is_free(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def register_task(name: str) -> Callable[[F], F]:
    """Register a callable that takes the section `[task]` and returns a Task
    (environments/task.py), for `task.name = name`."""
    return register("task", name)


def register_reward(name: str) -> Callable[[F], F]:
    """Register a reward function, sync or async, for `task.reward = name` or the `name` of one of
    `[[task.rewards]]`.

    It is called with the keywords `prompt`, `completion`, `answer` (str) and `metadata` (dict), and
    returns a number, or a dict with the number as `reward`, optionally `passed` (bool), and other
    numbers that are logged (environments/rewards.py)."""
    return register("reward", name)


def register_advantage(name: str) -> Callable[[F], F]:
    """Register a function from rewards to advantages (algorithms/advantages.py: one (N,) array per
    group in and out), for `objective.advantage = name`."""
    return register("advantage", name)


def register_policy_loss(name: str) -> Callable[[F], F]:
    """Register a function from LossTokens and Corrected to TokenLosses
    (algorithms/loss_tokens.py), for `objective.policy_loss = name`."""
    return register("policy_loss", name)
