"""The buffer service's process: connects the state machine with sockets, sinks and the task."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from speed_async.buffer.durability.recovery import open_machine
from speed_async.buffer.server import serve
from speed_async.buffer.service import BufferService
from speed_async.buffer.state import ServiceState
from speed_async.config.local_model import model_folder
from speed_async.config.model_facts import read_model_info
from speed_async.config.schema import Config
from speed_async.environments.registry import make_task
from speed_async.environments.suites import open_suites
from speed_async.environments.task import data_fingerprint
from speed_async.errors import ModelError
from speed_async.launcher.identity.model_files import model_fingerprint
from speed_async.launcher.run_folder import RunFolder
from speed_async.observability.metrics import Event
from speed_async.observability.sinks import JsonlSink, Sink
from speed_async.transport.curve import server_keys
from speed_async.transport.feed import FeedPublisher
from speed_async.transport.zeromq import open_hub


async def run_service(config: Config, run_folder: Path, *, attempt: int) -> None:
    """Bind the sockets, print their ports to stdout (one JSON line), and serve until the run ends.

    `attempt`: number of the attempt; all actors of an earlier attempt are lost.
    """
    loop = asyncio.get_running_loop()
    # The learner stops this process by protocol or by exiting; signals to the group are ignored.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(ignored, lambda: None)
    task = make_task(config.task)
    suites = open_suites(config.evaluate.suites)
    keys = server_keys(config.cluster)
    hub = await open_hub(config.cluster.host, config.cluster.service_port, keys=keys)
    feed = FeedPublisher(config.cluster.host, config.cluster.feed_port, keys=keys)
    task_fingerprint, model = data_fingerprint(task, suites), model_folder(config.model.path)
    folder_fingerprint = model_fingerprint(model, config.model)
    num_token_ids = vocab_size(model)

    def build(settings: Config, state: ServiceState | None) -> BufferService:
        return BufferService(
            settings,
            num_prompts=len(task.train_prompts),
            num_held_out=len(task.held_out_prompts),
            suite_sizes={name: len(prompts) for name, prompts in suites.items()},
            fingerprint=task_fingerprint,
            model_fingerprint=folder_fingerprint,
            started_s=time.monotonic(),
            feed_port=feed.port,
            vocab_size=num_token_ids,
            state=state,
        )

    keeps_journal = config.buffer.durability != "none"
    folder = RunFolder(path=run_folder).journal if keeps_journal else None
    replayed: list[Event] = []
    machine, notes = open_machine(
        folder,
        config,
        build,
        data=task_fingerprint,
        model=folder_fingerprint,
        attempt=attempt,
        replayed=replayed.extend,
    )
    for note in notes:
        sys.stderr.write(note + "\n")
    machine.service.warnings.show_first("\n".join(notes))
    sinks = make_sinks(config, run_folder, replayed)
    sys.stdout.write(json.dumps({"port": hub.port, "feed_port": feed.port}) + "\n")
    sys.stdout.flush()
    await serve(machine, hub, feed, sinks)


def vocab_size(folder: Path) -> int | None:
    """Vocabulary size of the model in this folder; None if its config.json does not contain it."""
    try:
        return read_model_info(folder).vocab_size
    except ModelError:
        return None


def make_sinks(config: Config, run_folder: Path, replayed: Sequence[Event] = ()) -> list[Sink]:
    """`replayed`: the last events of a killed process. Those that it did not store are stored."""
    metrics = JsonlSink(run_folder)
    sinks: list[Sink] = [metrics]
    lost = metrics.lost(replayed)
    for event in lost:  # before wandb, which may fail to start
        metrics.write(event)
    if config.observe.wandb:
        from speed_async.observability.wandb_sink import WandbSink

        sinks.append(
            WandbSink(
                run_folder=run_folder,
                project=config.observe.wandb_project,
                config=config.model_dump(),
            )
        )
    for sink in sinks[1:]:
        for event in lost:
            sink.write(event)
    return sinks
