"""log pi of sampled tokens, computed only at the positions that predict them.

Shape legend: B rows, L positions, P = B x L, N completion tokens, D distinct pairs of predicting
position and target, H hidden size, V vocabulary.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from speed_async.config.model_family import family_faults
from speed_async.errors import ModelError
from speed_async.learner.batch import MicroBatch, make_micro_batch
from speed_async.learner.limits import MAX_LOGITS
from speed_async.learner.model import embedding_table, output_head
from speed_async.learner.rows import (
    MAX_PACKED_TOKENS,
    LayoutCost,
    TrainingSample,
    make_row,
    split_row,
)

PAIR_PENALTY = 2.0
"""Masked attention reaches about half the FLOP/s of a matrix product (measured on a CPU)."""
PROBE_TOLERANCE = 1e-3
"""Largest accepted difference in log-probability between two layouts, in float32."""


def layout_cost(model: PreTrainedModel) -> LayoutCost:
    """Forward FLOPs: 2 per weight and position, 4 x H x layers per mask entry."""
    config = model.config.get_text_config()
    tables = {id(table): table for table in (embedding_table(model), output_head(model).weight)}
    embedded = sum(table.numel() for table in tables.values())
    return LayoutCost(
        per_token=2.0 * (model.num_parameters() - embedded),
        per_pair=PAIR_PENALTY * 4.0 * config.hidden_size * config.num_hidden_layers,
    )


class Policy(nn.Module):
    """log pi of the sampled tokens: base model on all positions, head on D positions."""

    def __init__(
        self, causal_lm: PreTrainedModel, *, temperature: float, entropy_gradient: bool = False
    ) -> None:
        super().__init__()
        self.entropy_gradient = entropy_gradient
        self.causal_lm = causal_lm
        self.temperature = temperature
        self.autocasts = True
        """Whether `forward` computes in bfloat16 on a GPU although the parameters are float32."""
        self.has_bfloat16 = False
        """Whether some parameters are in bfloat16, so that it computes in it on any device."""

    def forward(self, batch: MicroBatch, *, plain: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N,) with gradient and entropies (N,), with gradient if
        `entropy_gradient`, both of softmax(logits / temperature) over the full vocabulary, in
        float32.

        On a GPU, matrix products run in bfloat16; trained parameters and log-softmax stay in
        float32. `plain` uses temperature 1, and the precision of the parameters if all are float32.
        """
        device_type = batch.input_ids_BL.device.type
        on_gpu = device_type == "cuda"
        autocasts = self.autocasts and (self.has_bfloat16 or (on_gpu and not plain))
        with torch.autocast(device_type, torch.bfloat16, enabled=autocasts):
            return self.score(batch, temperature=1.0 if plain else None)

    def score(
        self, batch: MicroBatch, *, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward` in the precision of the parameters. `temperature` None uses that of the
        policy.

        The gradient of a float32 head is summed over chunks of `MAX_LOGITS` logits in float32, also
        under autocast. A bfloat16 head, as gathered by FSDP in half precision, sums it in bfloat16.
        """
        temperature = temperature or self.temperature
        hidden_DH, targets_D = self._hidden(batch), batch.target_ids_D
        chunk = max(1, MAX_LOGITS // output_head(self.causal_lm).out_features)
        if len(hidden_DH) <= chunk:
            scores_D2 = self._score_chunk(hidden_DH, targets_D, temperature)
        else:
            with _autocast_without_cache(hidden_DH.device.type):
                parts = [
                    checkpoint(self._score_chunk, hidden, targets, temperature, use_reentrant=False)
                    for hidden, targets in zip(
                        hidden_DH.split(chunk), targets_D.split(chunk), strict=True
                    )
                ]
            scores_D2 = torch.cat(parts)
        # The backward of an embedding lookup adds duplicates in a fixed order, also on a GPU.
        logprobs_N, entropies_N = F.embedding(batch.pair_index_N, scores_D2).unbind(1)
        return logprobs_N, entropies_N

    def _hidden(self, batch: MicroBatch) -> Tensor:
        layout = {}
        if batch.mask_B1LL is not None:
            layout = {"attention_mask": batch.mask_B1LL, "position_ids": batch.position_ids_BL}
        hidden_BLH = self.causal_lm.base_model(
            input_ids=batch.input_ids_BL, use_cache=False, **layout
        ).last_hidden_state
        return F.embedding(batch.predictor_index_D, hidden_BLH.flatten(0, 1))

    def _score_chunk(self, hidden_DH: Tensor, target_ids_D: Tensor, temperature: float) -> Tensor:
        """Log-probability and entropy (D, 2)."""
        logits_DV = output_head(self.causal_lm)(hidden_DH).float() / temperature
        logprobs_DV = logits_DV.log_softmax(-1)
        with torch.set_grad_enabled(self.entropy_gradient and torch.is_grad_enabled()):
            entropies_D = -(logprobs_DV.exp() * logprobs_DV).sum(-1)
        logprobs_D = logprobs_DV.gather(-1, target_ids_D[:, None])[:, 0]
        return torch.stack([logprobs_D, entropies_D], dim=1)


def _autocast_without_cache(device_type: str) -> torch.autocast:
    """The current autocast, with a bfloat16 copy of the head for each chunk: the gradients of the
    chunks then add in float32. Autocast caches one copy, whose gradient adds in bfloat16, with an
    error that grows with the number of chunks. Without gradients, one copy serves all."""
    return torch.autocast(
        device_type,
        torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=not torch.is_grad_enabled(),
    )


def check_policy(policy: Policy, context_length: int | None) -> bool:
    """Evaluates a few tokens in every layout. Returns whether completions can share a row.

    `context_length`: prompt plus completion tokens of the run; None if unknown.
    Raises ModelError when log pi differs from that of the complete model, as in families that scale
    or cap their logits. The trained policy would then differ from that of the engine.
    """
    model = policy.causal_lm
    for fault in family_faults(model.config.get_text_config().to_dict(), context_length):
        raise ModelError(f"{type(model).__name__}: {fault}")
    separate, packed = _probes(embedding_table(model))
    with torch.no_grad():
        try:
            logprobs_N, _ = policy.score(separate)
        except AttributeError as error:
            raise ModelError(
                f"{type(model).__name__} has no base model and head: {error}"
            ) from error
        logits_PV = model(input_ids=separate.input_ids_BL).logits.flatten(0, 1)
        logits_DV = logits_PV[separate.predictor_index_D].float() / policy.temperature
        expected_D = -F.cross_entropy(logits_DV, separate.target_ids_D, reduction="none")
        expected_N = expected_D[separate.pair_index_N]
        if not torch.allclose(logprobs_N, expected_N, atol=PROBE_TOLERANCE):
            raise ModelError(
                f"{type(model).__name__} changes its logits after the head (scaling or capping), "
                "which the learner does not support: choose another model family"
            )
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        if window is not None and window < MAX_PACKED_TOKENS:
            return False
        try:
            shared_N, _ = policy.score(packed)
        except (TypeError, ValueError, RuntimeError):
            return False  # this family does not support 4-D masks or position ids
    return torch.allclose(shared_N, expected_N, atol=PROBE_TOLERANCE)


def _probes(table: Tensor) -> tuple[MicroBatch, MicroBatch]:
    """Three completions of one prompt, in separate rows and in one row; two begin alike."""
    prompt, *completions = (
        np.array(ids, dtype=np.int32) % len(table)
        for ids in ((1, 2, 3), (4, 5, 6, 7), (4, 8, 9), (7, 8))
    )
    samples = [
        TrainingSample(
            token_ids=ids,
            logprobs=np.zeros(len(ids), np.float32),
            policy_versions=np.zeros(len(ids), np.int32),
            advantage=0.0,
            weight=1.0,
        )
        for ids in completions
    ]
    row = make_row(prompt, samples)
    separate, packed = (
        make_micro_batch(list(split_row(row, width)), policy_version=0)
        for width in (1, len(samples))
    )
    return separate.to(table.device), packed.to(table.device)
