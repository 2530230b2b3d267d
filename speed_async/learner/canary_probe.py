"""Canary log-probabilities under the learner's current weights.

Shape legend: T canary tokens, N = T-1 predicted ones.
"""

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from speed_async.errors import ModelError
from speed_async.learner.batch import make_micro_batch
from speed_async.learner.model import context_length, embedding_table
from speed_async.learner.rows import TrainingSample, make_row
from speed_async.weight_sync.canary_check import CANARY_TOKENS, Canary, canary_token_ids


class CanaryProbe:
    """A fixed row of tokens, converted to tensors once."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_context: int | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """`max_context` is the configured `model.context_length`. `device`: on which the policy
        computes; None: where its parameters are."""
        table = embedding_table(model)
        limit = context_length(model, max_context) or CANARY_TOKENS
        self._token_ids = canary_token_ids(len(table), context_length=limit, seed=seed)
        first, *rest = np.array_split(np.array(self._token_ids, np.int32), [1])
        sample = TrainingSample(
            token_ids=rest[0],
            logprobs=np.zeros(len(rest[0]), np.float32),
            policy_versions=np.zeros(len(rest[0]), np.int32),
            advantage=0.0,
            weight=1.0,
        )
        row = make_row(first, [sample])
        self._batch = make_micro_batch([row], policy_version=0).to(device or table.device)

    @torch.no_grad()
    def measure(self, policy: nn.Module) -> Canary:
        """Runs one forward pass of `policy`.

        It runs in the precision of the parameters, before any cast by the sender. The tolerance of
        the receivers covers the rounding error of that cast. Raises ModelError when a value is not
        finite.
        """
        logprobs_N, _ = policy(self._batch, plain=True)
        if not logprobs_N.isfinite().all():
            raise ModelError(
                "the updated weights give non-finite log-probabilities: training has diverged; "
                "lower learner.lr or learner.grad_clip"
            )
        return Canary(token_ids=self._token_ids, logprobs=tuple(logprobs_N.tolist()))
