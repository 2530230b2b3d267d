"""Entry point of child processes: `python -m speed_async.launcher.child ROLE ...` (internal)."""

import argparse
import os
import signal
import sys
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from speed_async.config.load import read_resolved
from speed_async.errors import IncarnationLost, WeightSyncError
from speed_async.launcher.event_loop import run
from speed_async.launcher.exit_status import EXIT_FAILED, EXIT_INCARNATION_LOST, record
from speed_async.launcher.large_imports import large_imports
from speed_async.launcher.logs import log_stderr
from speed_async.launcher.processes import die_with_parent
from speed_async.launcher.run_folder import RunFolder


def main() -> int:
    arguments = _parse()
    # The console restores the terminal's modes on SIGTERM, and exits at once.
    last_signal = signal.SIGTERM if arguments.role == "console" else signal.SIGKILL
    die_with_parent(arguments.parent, last_signal)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the parent handles it and stops this process
    log_stderr()
    role = f"actor-{arguments.index}" if arguments.role == "actor" else arguments.role
    folder = RunFolder(path=Path(arguments.run_folder))
    try:
        run(_role(arguments))
    except (IncarnationLost, WeightSyncError) as error:
        record(folder.error(role), role, error)
        return EXIT_INCARNATION_LOST  # a new incarnation may succeed
    except Exception as error:  # boundary of the process: message to error file, traceback to log
        record(folder.error(role), role, error)
        return EXIT_FAILED
    return 0


def _role(arguments: argparse.Namespace) -> Coroutine[Any, Any, None]:
    """Each role imports only its own modules: the service and the console never load torch."""
    config = read_resolved(Path(arguments.config))
    if arguments.role == "console":
        from speed_async.launcher.roles.console_role import Source, run_console
        from speed_async.launcher.roles.watched_run import history_of
        from speed_async.transport.curve import client_keys

        folder = Path(arguments.run_folder)
        source = Source(
            host=arguments.host,
            port=arguments.port,
            title=folder.name,
            keys=client_keys(config.cluster),
            history=history_of(folder),
        )
        return run_console(source)
    if arguments.role == "service":
        from speed_async.launcher.roles.service_role import run_service

        ports = {"service_port": arguments.port, "feed_port": arguments.feed_port}
        fixed_ports = {name: port for name, port in ports.items() if port}
        cluster = config.cluster.model_copy(update=fixed_ports)
        config = config.model_copy(update={"cluster": cluster})
        return run_service(config, Path(arguments.run_folder), attempt=arguments.attempt)
    with large_imports():
        from speed_async.launcher.roles.actor_role import run_actor
        from speed_async.launcher.roles.engine_choice import start_engine

    actor = {"index": arguments.index, "incarnation": arguments.incarnation}
    # A stopped (SIGSTOP) engine does not see its actor's socket close; the kernel kills it instead.
    engine = start_engine(config, **actor, begin=partial(die_with_parent, os.getpid()))
    run = {"host": arguments.host, "port": arguments.port, "joined": arguments.joined}
    return run_actor(config, **actor, **run, engine=engine)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("service", "actor", "console"))
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--run-folder", required=True)
    parser.add_argument("--config")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--feed-port", type=int)
    parser.add_argument("--attempt", type=int, default=0)
    parser.add_argument("--index", type=int)
    parser.add_argument("--incarnation", type=int)
    parser.add_argument("--joined", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
