"""Creates the configured engine."""

import importlib
from collections.abc import Callable
from functools import partial

import numpy as np

from speed_async.actors.engine import ManagedEngine
from speed_async.actors.stepped_engine.engine import SteppedEngine
from speed_async.actors.stepped_engine.process import ProcessWorker, may_fork
from speed_async.actors.stepped_engine.stepper import Stepper
from speed_async.actors.torch_engine.engine import load_torch_generator
from speed_async.config.schema import Config
from speed_async.launcher.large_imports import large_imports
from speed_async.testing.scripted_run import load_scripted_stepper

SHARED_MODULES = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
"""Slow imports that actor and engine process share when the engine is forked."""


def start_engine(
    config: Config, *, index: int, incarnation: int, begin: Callable[[], None] | None = None
) -> ManagedEngine:
    """Create the configured engine, an async context manager. Call it before any event loop or
    thread is started: the embedded engine starts its process immediately, possibly by fork, and
    calls `begin` there first."""
    seeds = np.random.SeedSequence([config.run.seed, index, incarnation])
    seed = int(seeds.generate_state(1)[0])
    if config.actors.engine == "vllm":
        with large_imports():
            from speed_async.actors.vllm_engine.start import make_vllm_engine

        return make_vllm_engine(config, seed=seed)
    return SteppedEngine(start_stepper(config, seed=seed, begin=begin))


def start_stepper(
    config: Config, *, seed: int, begin: Callable[[], None] | None = None
) -> ProcessWorker:
    """Start the process of a torch or scripted engine."""
    fork = may_fork(config.actors.device)
    if fork:
        with large_imports():
            for name in SHARED_MODULES:
                importlib.import_module(name)
    make_stepper = _stepper_maker(config, seed=seed)
    if begin is not None:
        make_stepper = partial(_after, begin, make_stepper)
    return ProcessWorker(make_stepper, load_timeout_s=config.cluster.stall_timeout_s, fork=fork)


def _stepper_maker(config: Config, *, seed: int) -> Callable[[], Stepper]:
    if config.actors.engine == "scripted":
        return partial(load_scripted_stepper, config.model, config.actors, seed=seed)
    return partial(
        load_torch_generator,
        config.model,
        config.actors,
        seed=seed,
        canary_tolerance=config.weights.canary_tolerance,
    )


def _after(begin: Callable[[], None], make_stepper: Callable[[], Stepper]) -> Stepper:
    begin()
    return make_stepper()
