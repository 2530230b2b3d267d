"""The actor's process: wires engine, verifier, task and link to the loop."""

import asyncio
import contextlib
import gc
import importlib
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from speed_async.actors.engine_process import ProcessWorker, may_fork
from speed_async.actors.loop import ActorLoop
from speed_async.actors.model_folder import check_model_folder, load_tokenizer
from speed_async.actors.prompt_codec import PromptCodec
from speed_async.actors.rollout import Rollout
from speed_async.actors.stepped_engine import SteppedEngine
from speed_async.actors.stepper import Stepper
from speed_async.actors.torch_engine import load_torch_generator
from speed_async.config.schema import Config
from speed_async.errors import GivenUp, SpeedAsyncError, WeightSyncError
from speed_async.runtime.failure import describe
from speed_async.runtime.processes import die_with_parent
from speed_async.tasks.registry import make_task
from speed_async.tasks.task import fingerprint
from speed_async.tasks.verifier import VerifierPool
from speed_async.wire import messages as m
from speed_async.wire.transport import Link
from speed_async.wire.zeromq import open_link


def start_engine(config: Config, *, index: int, incarnation: int) -> ProcessWorker:
    """Start the engine's process. To be called before there is an event loop or a thread."""
    fork = may_fork(config.actors.device)
    if fork:
        importlib.import_module("transformers.models.auto")  # seconds; once for both processes
    seeds = np.random.SeedSequence([config.run.seed, index, incarnation])
    seed = int(seeds.generate_state(1)[0])
    gc.freeze()  # full collections need not go through all that was imported: 170 ms each
    load = partial(load_torch_generator, config.model, config.actors, seed=seed)
    return ProcessWorker(
        partial(_in_child_of, os.getpid(), load),
        load_timeout_s=config.cluster.stall_timeout_s,
        fork=fork,
    )


def _in_child_of(actor_id: int, load: Callable[[], Stepper]) -> Stepper:
    """A stopped engine does not see its actor's socket close; the kernel ends it all the same."""
    die_with_parent(actor_id)
    return load()


async def run_actor(
    config: Config,
    *,
    index: int,
    incarnation: int,
    host: str,
    port: int,
    joined: bool,
    engine: ProcessWorker,
) -> None:
    """Work until the service drains this actor, or SIGTERM does.

    An error of its own ends the run, unless it has `joined` the run by itself.
    """
    name = f"actor-{index}"
    link = await open_link(host, port, f"{name}.{incarnation}")
    try:
        await _work(config, name, index, incarnation, link, SteppedEngine(engine))
    except (GivenUp, WeightSyncError):
        raise  # the supervisor starts another incarnation: no matter for the other roles
    except Exception as error:  # the role's boundary: told to the others, then raised on
        if not joined:
            await _tell(link, name, describe(name, error))
        raise
    finally:
        await link.close()


async def _work(
    config: Config, name: str, index: int, incarnation: int, link: Link, engine: SteppedEngine
) -> None:
    task = make_task(config.task)
    verifier = VerifierPool(
        partial(make_task, config.task),
        config.actors.verifier_workers,
        config.actors.verifier_timeout_s,
    )
    folder = Path(config.model.path)
    check_model_folder(folder)
    codec = PromptCodec(load_tokenizer(folder), chat_template=config.model.chat_template)
    async with verifier, engine:
        loop = ActorLoop(
            config,
            name=name,
            link=link,
            engine=engine,
            rollout=Rollout(config, engine, verifier, codec),
            task=task,
        )
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, loop.request_drain)
        await loop.run(
            m.Hello(
                role="actor",
                index=index,
                incarnation=incarnation,
                fingerprint=fingerprint(task),
                process_id=os.getpid(),
            )
        )


async def _tell(link: Link, role: str, text: str) -> None:
    """Let the service stop the others; the error itself travels by the error file as well."""
    with contextlib.suppress(SpeedAsyncError):
        await link.send(m.Failure(role=role, message=text))
