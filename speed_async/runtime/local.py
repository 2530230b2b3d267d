"""`speed-async train`: the same elastic launcher as torchrun, inside this process."""

import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from speed_async.config.schema import Config
from speed_async.runtime.failure import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_NOTHING_LEARNED
from speed_async.runtime.processes import ENVIRONMENT

STOP_GRACE_S = 60
"""On top of the drain: an update under way may end and a checkpoint be written."""


def launch_local(config: Config, arguments: Sequence[str]) -> int:
    """Run all ranks on this machine; returns the exit status of the run."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.cluster.learners + config.cluster.actors,
        run_id=f"speed_async-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=config.cluster.max_restarts,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(),
        shutdown_timeout=int(config.cluster.drain_timeout_s) + STOP_GRACE_S,
    )
    start = elastic_launch(launch, sys.executable)
    try:
        start("-m", "speed_async.launch", *arguments)
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        if failure.exitcode in (EXIT_INTERRUPTED, EXIT_NOTHING_LEARNED):
            return failure.exitcode
        sys.stderr.write(f"error: {failure.message}\n")
        return EXIT_FAILED
    except SignalException:
        return EXIT_INTERRUPTED
    return 0
