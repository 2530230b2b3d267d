"""Splits the groups of a batch into mini-batches."""

from collections.abc import Sequence

import numpy as np


def split_groups(num_groups: int, num_minibatches: int, *, seed: Sequence[int]) -> list[list[int]]:
    """Indices of the groups of each mini-batch: in order of the batch for a single one, otherwise
    in random order. Sizes differ by at most one.

    `seed` identifies the pass: run seed, policy version and number of the pass. No generator
    outlives the pass, so a resumed run splits a batch as the interrupted one did.
    Raises ValueError for fewer groups than mini-batches.
    """
    if num_groups < num_minibatches:
        raise ValueError(f"{num_groups} groups cannot be split into {num_minibatches} mini-batches")
    order = np.arange(num_groups)
    if num_minibatches > 1:
        order = np.random.default_rng(list(seed)).permutation(num_groups)
    return [part.tolist() for part in np.array_split(order, num_minibatches)]
