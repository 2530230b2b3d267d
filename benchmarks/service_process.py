"""The buffer service as a standalone process for benchmarks.

Usage: python -m benchmarks.service_process SETTINGS.json RUN_FOLDER [PROFILE]
With PROFILE it runs under cProfile, writes the profile at SIGUSR1, and exits.
"""

import cProfile
import os
import signal
import sys
from pathlib import Path

from speed_async.config.schema import Config
from speed_async.launcher.event_loop import run
from speed_async.launcher.processes import die_with_parent
from speed_async.launcher.roles.service_role import run_service


def main() -> None:
    die_with_parent(os.getppid())
    settings, folder, *profile = sys.argv[1:]
    config = Config.model_validate_json(Path(settings).read_text())
    if not profile:
        run(run_service(config, Path(folder), attempt=0))
        return
    profiler = cProfile.Profile()

    def write_profile(*_: object) -> None:
        profiler.disable()
        profiler.dump_stats(profile[0])
        os._exit(0)

    signal.signal(signal.SIGUSR1, write_profile)
    profiler.runcall(run, run_service(config, Path(folder), attempt=0))


if __name__ == "__main__":
    main()
