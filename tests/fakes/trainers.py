"""Trainers of tiny models."""

from pathlib import Path
from typing import Any

from speed_async.learner.model import load_model
from speed_async.learner.progress import Progress
from speed_async.learner.trainer import Trainer
from speed_async.weight_sync.buckets import flatten_parameters
from tests.fakes.learner_samples import make_config


def make_trainer(folder: Path, **learner: Any) -> Trainer:
    """A trainer as in a run: flattened parameters and a warm-up of five updates."""
    config = make_config(folder, **({"lr": 0.01, "warmup_updates": 5} | learner))
    model = load_model(folder, device="cpu")
    flatten_parameters(model)
    return Trainer(config=config, model=model)


def at(policy_version: int) -> Progress:
    """One optimiser update per version."""
    return Progress(policy_version=policy_version, optimizer_updates=policy_version)
