"""The actor's process: connects engine, verifier, task and link with the actor loop."""

import asyncio
import contextlib
import os
import signal
import sys
from functools import partial
from pathlib import Path

from speed_async.actors.engine import ManagedEngine
from speed_async.actors.failed_completions import FailedCompletions
from speed_async.actors.loop import ActorLoop
from speed_async.actors.model_folder import check_model_folder, load_tokenizer
from speed_async.actors.prompt_codec import configured_codec
from speed_async.actors.rollout import Rollout
from speed_async.config.local_model import model_folder
from speed_async.config.schema import Config
from speed_async.environments.registry import make_task
from speed_async.environments.suites import SuiteVerifiers, open_suites
from speed_async.environments.task import data_fingerprint
from speed_async.environments.verifier import VerifierPool
from speed_async.errors import IncarnationLost, SpeedAsyncError, WeightSyncError
from speed_async.launcher.exit_status import describe
from speed_async.launcher.identity.model_files import model_fingerprint
from speed_async.launcher.run_folder import RunFolder
from speed_async.transport import messages as m
from speed_async.transport.curve import client_keys
from speed_async.transport.session import SessionLink
from speed_async.transport.tracing import with_tracing
from speed_async.transport.transport import Link
from speed_async.transport.zeromq import open_link


async def run_actor(
    config: Config,
    *,
    index: int,
    incarnation: int,
    host: str,
    port: int,
    joined: bool,
    engine: ManagedEngine,
) -> None:
    """Run the actor until the service or SIGTERM drains it.

    An unexpected error ends the run, unless this actor `joined` it later (`--join`).
    """
    name = f"actor-{index}"
    keys = client_keys(config.cluster)
    peer = f"{name}.{incarnation}"
    wire = with_tracing(await open_link(host, port, peer, keys=keys), config.observe.trace, peer)
    link = SessionLink(wire)
    try:
        await _work(config, name, index, incarnation, link, engine)
    except (IncarnationLost, WeightSyncError):
        raise  # the supervisor starts another incarnation; other roles are not affected
    except Exception as error:  # boundary of the role: reported to the service, then re-raised
        if not joined:
            await _report_failure(link, name, describe(name, error))
        raise
    finally:
        await link.close()


async def _work(
    config: Config,
    name: str,
    index: int,
    incarnation: int,
    link: SessionLink,
    engine: ManagedEngine,
) -> None:
    task = make_task(config.task)
    suites = open_suites(config.evaluate.suites)
    suite_verifiers = SuiteVerifiers(config)
    verifier = VerifierPool(
        partial(make_task, config.task),
        config.actors.verifier_workers,
        config.actors.verifier_timeout_s,
        rewards=config.task.weighted_rewards,
    )
    folder = model_folder(config.model.path)
    check_model_folder(folder)
    codec = configured_codec(load_tokenizer(folder), config.model)
    failures = FailedCompletions(RunFolder(path=Path(config.run.folder)).failed(name))
    sys.stderr.write(
        f"{name}.{incarnation}: loading {folder} with the {config.actors.engine} engine\n"
    )
    async with verifier, suite_verifiers, engine:
        sys.stderr.write(f"{name}.{incarnation}: engine and verifier are ready; joining the run\n")
        loop = ActorLoop(
            config,
            name=name,
            link=link,
            engine=engine,
            rollout=Rollout(
                config,
                engine,
                verifier,
                codec,
                suite_scorers=suite_verifiers.by_suite,
                failures=failures,
            ),
            task=task,
            suites=suites,
        )
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, loop.request_drain)
        await loop.run(
            m.Hello(
                role="actor",
                index=index,
                incarnation=incarnation,
                fingerprint=data_fingerprint(task, suites),
                model_fingerprint=model_fingerprint(folder, config.model),
                process_id=os.getpid(),
                weight_ranks=config.actors.weight_ranks,
            )
        )


async def _report_failure(link: Link, role: str, text: str) -> None:
    """Send the error to the service, which ends the run; the error file contains it as well."""
    with contextlib.suppress(SpeedAsyncError):
        await link.send(m.Failure(role=role, message=text))
