"""Plans the evaluation of a run: its configuration and its checkpoints."""

import json
from pathlib import Path

from speed_async.config.load import parse_config
from speed_async.config.resumed import CONFIG_FILE
from speed_async.errors import SpeedAsyncError
from speed_async.launcher.evaluation.plan import Options, Plan, plan_run
from speed_async.launcher.run_folder import RunFolder
from speed_async.learner.checkpoint.store import checkpoint_folder, kept_versions


def plan_run_folder(folder: Path, options: Options) -> Plan:
    """Evaluate all checkpoints of a run, oldest first.

    Raises SpeedAsyncError when the folder is no run folder, or has no checkpoint.
    """
    run = RunFolder(path=folder.expanduser().resolve())
    if not run.config.is_file():
        raise SpeedAsyncError(
            f"'{folder}' is not a run folder (it has no {CONFIG_FILE}); for a model folder: "
            f"--model {folder}"
        )
    config = parse_config(json.loads(run.config.read_text(encoding="utf-8")))
    checkpoints = [
        checkpoint_folder(run.checkpoints, version) for version in kept_versions(run.checkpoints)
    ]
    if not checkpoints:
        raise SpeedAsyncError(
            f"the run in '{folder}' has no checkpoint yet (learner.checkpoint_every = "
            f"{config.learner.checkpoint_every}); for its initial model: --model "
            f"{config.model.path}"
        )
    return plan_run(run.path, config, checkpoints, options)
