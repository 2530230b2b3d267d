"""Asynchronous actor-learner reinforcement learning with pass-rate screening.

The public API: `train`, `load_config`, `Config`, and one decorator for each part that a
configuration can name (docs/extending.md).
"""

from speed_async.api import (
    register_advantage,
    register_policy_loss,
    register_reward,
    register_task,
    train,
)
from speed_async.config.load import load_config
from speed_async.config.schema import Config

__version__ = "0.1.0"
__all__ = [
    "Config",
    "load_config",
    "register_advantage",
    "register_policy_loss",
    "register_reward",
    "register_task",
    "train",
]
