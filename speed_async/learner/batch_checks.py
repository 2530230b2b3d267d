"""Checks of the groups of a batch before they are trained on."""

import math
from collections.abc import Sequence

import numpy as np

from speed_async.errors import ModelError
from speed_async.types import Group


def check_token_ids(groups: Sequence[Group], *, num_token_ids: int) -> None:
    """Raises ModelError for a token id outside the vocabulary of the model."""
    arrays = [group.prompt_token_ids for group in groups]
    arrays += [c.sampled.token_ids for group in groups for c in group.completions]
    token_ids = np.concatenate(arrays)
    if token_ids.min() < 0 or token_ids.max() >= num_token_ids:
        raise ModelError(
            f"a group has token ids {token_ids.min()}..{token_ids.max()}, the model has "
            f"{num_token_ids}: actors and learner must use the same model folder"
        )


def inputs_finite(groups: Sequence[Group]) -> bool:
    """Whether all rewards and behaviour log-probabilities are finite."""
    completions = [c for group in groups for c in group.completions]
    logprobs = np.concatenate([c.sampled.logprobs for c in completions])
    return bool(np.isfinite(logprobs).all()) and all(math.isfinite(c.reward) for c in completions)
