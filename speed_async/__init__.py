"""Asynchronous actor-learner reinforcement learning with pass-rate screening."""

__version__ = "0.1.0"
