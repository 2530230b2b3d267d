"""The engine that the configuration asks for, and what its process needs."""

import gc
import importlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from speed_async.actors.engine import OwnedEngine
from speed_async.actors.stepped_engine.engine import SteppedEngine
from speed_async.actors.stepped_engine.process import ProcessWorker, may_fork
from speed_async.actors.stepped_engine.stepper import Stepper
from speed_async.actors.torch_engine.engine import load_torch_generator
from speed_async.actors.vllm_engine.options import process_environment
from speed_async.config.schema import Config
from speed_async.testing.scripted_run import load_scripted_stepper


def start_engine(
    config: Config, *, index: int, incarnation: int, begin: Callable[[], None] | None = None
) -> OwnedEngine:
    """An engine to be entered. To be called before there is an event loop or a thread: the
    embedded one starts its process at once, perhaps by a fork, and calls `begin` there first."""
    seeds = np.random.SeedSequence([config.run.seed, index, incarnation])
    seed = int(seeds.generate_state(1)[0])
    if config.actors.engine == "vllm":
        from speed_async.actors.vllm_engine.start import make_vllm_engine

        return make_vllm_engine(config, seed=seed)
    return SteppedEngine(start_stepper(config, seed=seed, begin=begin))


def engine_environment(config: Config) -> dict[str, str]:
    """Environment of an actor's process beyond its parent's; it must be there before torch is."""
    if config.actors.engine != "vllm":
        return {}
    return process_environment(config, on_cpu=not torch.cuda.is_available())


def start_stepper(
    config: Config, *, seed: int, begin: Callable[[], None] | None = None
) -> ProcessWorker:
    """The process of an embedded or a scripted engine, begun."""
    fork = may_fork(config.actors.device)
    if fork:
        importlib.import_module("transformers.models.auto")  # seconds; once for both processes
    gc.freeze()  # full collections need not go through all that was imported: 170 ms each
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
