"""Evaluates models on suites: engine, verifier, sample files, results.

Models are evaluated one after another, and so are the suites of one model. Each model has one
engine, which is not started when no sample is missing.
"""

import asyncio
import gc
import os
import sys
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from speed_async.actors.engine import ManagedEngine
from speed_async.environments.verifier import VerifierPool
from speed_async.errors import IncarnationLost, SpeedAsyncError
from speed_async.evaluation.records import SampleFile, read_records, samples_path
from speed_async.evaluation.results import SuiteResult, summarize
from speed_async.evaluation.results_file import write_result
from speed_async.evaluation.table import ModelResults
from speed_async.launcher.evaluation.model import PreparedModel, prepare_model
from speed_async.launcher.evaluation.plan import Plan, Target
from speed_async.launcher.evaluation.progress import SuiteProgress
from speed_async.launcher.evaluation.sampling import NUM_PER_SLOT, Sampler, sample_suite
from speed_async.launcher.evaluation.suites import Suite, held_out_suite, open_suite
from speed_async.launcher.event_loop import run, stop_event
from speed_async.launcher.logs import log_to
from speed_async.launcher.roles.engine_choice import start_engine

ENGINE_LOG = "engine.log"


class Interrupted(Exception):
    """A stop signal arrived; the samples so far are on disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Suite:
    """A suite with the settings of its sample file."""

    suite: Suite
    settings: dict[str, Any]
    path: Path

    def num_missing(self) -> int:
        expected = len(self.suite.prompts) * self.suite.num_samples
        if not self.path.is_file():
            return expected
        records = read_records(self.path)
        return expected - sum(each.sample < self.suite.num_samples for each in records)


def evaluate(plan: Plan, *, seed: int, console: Console) -> list[ModelResults]:
    """Evaluate every target on every suite; results are written to the targets' folders.

    `console` shows progress. Call it before any event loop or thread is started (`start_engine`).
    Raises SpeedAsyncError, and Interrupted on a stop signal.
    """
    suites = [
        open_suite(each.config, format=each.format, max_new_tokens=each.max_new_tokens)
        for each in plan.suites
    ]
    if plan.held_out_of is not None:
        suites.insert(0, held_out_suite(plan.held_out_of))
    for suite in suites:
        if suite.note:
            console.print(suite.note, highlight=False)
    try:
        return [
            ModelResults(
                name=target.name if len(plan.targets) > 1 else "",
                suites=tuple(_evaluate_target(target, suites, seed, console)),
            )
            for target in plan.targets
        ]
    except OSError as error:
        where = f" '{error.filename}'" if error.filename else ""
        raise SpeedAsyncError(
            f"a file{where} cannot be written or read ({error.strerror or error}): make space, or "
            "set another folder with --out"
        ) from error


def _evaluate_target(
    target: Target, suites: Sequence[Suite], seed: int, console: Console
) -> list[SuiteResult]:
    model = prepare_model(target, suites)
    for note in model.notes:
        console.print(f"{target.name}: {note}", highlight=False)
    work = [
        _Suite(
            suite=suite,
            settings=suite.settings() | model.settings() | {"seed": seed},
            path=samples_path(target.out, suite.name),
        )
        for suite in suites
    ]
    for each in work:  # before the engine starts: their settings may be refused
        with SampleFile(each.path, each.settings):
            pass
    if any(each.num_missing() > 0 for each in work):
        _generate(target, model, work, seed, console)
    results = []
    for each in work:
        result = summarize(
            each.suite.name,
            read_records(each.path),
            num_prompts=len(each.suite.prompts),
            num_samples=each.suite.num_samples,
            match=each.suite.match,
        )
        write_result(target.out, result, each.settings)
        results.append(result)
    return results


def _generate(
    target: Target, model: PreparedModel, work: Sequence[_Suite], seed: int, console: Console
) -> None:
    """Generate the missing samples of all suites."""
    log = target.out / ENGINE_LOG
    console.print(
        f"{target.name}: loading {model.config.model.path} with the {model.config.actors.engine} "
        f"engine (log: {log})",
        highlight=False,
        soft_wrap=True,
    )
    with _stderr_to(log):
        try:
            engine = start_engine(model.config, index=0, incarnation=0)
            run(_until_stopped(_sample_all(engine, model, work, seed, console)))
            del engine
            gc.collect()  # vLLM's finalizer fails when it runs at the exit of the interpreter
        except IncarnationLost as error:
            raise SpeedAsyncError(
                f"{error} ({log}); run the same command to continue where it ended"
            ) from error


async def _sample_all(
    engine: ManagedEngine,
    model: PreparedModel,
    work: Sequence[_Suite],
    seed: int,
    console: Console,
) -> None:
    actors = model.config.actors
    async with engine:
        for each in work:
            suite = each.suite
            with SampleFile(each.path, each.settings) as file:
                num_total = len(suite.prompts) * suite.num_samples
                num_present = sum(record.sample < suite.num_samples for record in file.records)
                if num_present == num_total:
                    continue
                verifier = VerifierPool(
                    suite.make_task,
                    actors.verifier_workers,
                    actors.verifier_timeout_s,
                    rewards=suite.rewards,
                )
                progress = SuiteProgress(
                    console, suite.name, num_present=num_present, num_total=num_total
                )
                async with verifier:
                    sampler = Sampler(
                        engine=engine,
                        verifier=verifier,
                        codec=model.codec,
                        seed=seed,
                        num_concurrent=NUM_PER_SLOT * actors.num_slots,
                    )
                    with progress:
                        await sample_suite(
                            suite, model.token_ids[suite.name], file, sampler, progress.add
                        )


async def _until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Raises Interrupted when a stop signal arrives first; `work` is then cancelled."""
    stopping = asyncio.create_task(stop_event().wait())
    working = asyncio.create_task(work)
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    if not working.done():
        working.cancel()
        await asyncio.wait((working,))
        raise Interrupted
    await working


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Redirect stderr to a log, including that of libraries and child processes."""
    sys.stderr.flush()
    stream, before = sys.stderr, os.dup(2)
    try:
        log_to(path)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        sys.stderr = stream
