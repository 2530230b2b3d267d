"""Decode attention per cache block, without repeating the keys and values of grouped heads.

Decoding one token per row is bound by reading keys and values. The default path repeats them for
grouped-query models, and every row attends over the length of the longest row.

Shape legend: N rows in use, Q query heads, H key/value heads, G = Q / H query heads sharing one,
L largest capacity, D head dimension, V vectors of a SlotCache.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from speed_async.actors.torch_engine.slot_blocks import SlotSpan
from speed_async.errors import ModelError

SPANS_KEYWORD = "slot_spans"
"""Keyword of the model's forward, which passes it to every attention layer."""

_IMPLEMENTATION = "speed_async_spans"


def attend_by_span(model: Any) -> bool:
    """Switch a model with SDPA attention to `span_attention`; False when not supported.

    Forward passes without spans are unchanged.
    """
    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(_IMPLEMENTATION, span_attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(_IMPLEMENTATION)
    return model.config._attn_implementation == _IMPLEMENTATION


def span_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    slot_spans: list[SlotSpan] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query (N, Q, 1, D) over the stores of a SlotCache; returns (N, 1, Q, D).

    `key` and `value` are (1, H, V / H, D), or with one block (N, H, capacity, D);
    `attention_mask` is additive, (N, 1, 1, L). Without spans this is plain SDPA. Raises ModelError
    for SDPA keywords that it does not support.
    """
    if slot_spans is None or attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if kwargs.get("position_bias") is not None:
        raise ModelError(
            f"{type(module).__name__} uses a position bias, which the torch engine does not "
            'support: use engine = "vllm"'
        )
    output_NQ1D = attend(
        query, key, value, mask_N11L=attention_mask, spans=slot_spans, scaling=scaling
    )
    return output_NQ1D.transpose(1, 2), None


def attend(
    query_NQ1D: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask_N11L: Tensor,
    spans: Sequence[SlotSpan],
    scaling: float | None,
) -> Tensor:
    """Attention (N, Q, 1, D) over the stores that `SlotCache.update` returned, one call per span.
    The mask is additive."""
    num_rows, num_query_heads, _, dim = query_NQ1D.shape
    num_heads = keys.shape[1]
    # Query heads that share keys become query positions, so keys are not repeated.
    query_NHGD = query_NQ1D.reshape(num_rows, num_heads, num_query_heads // num_heads, dim)
    keys_VD, values_VD = keys.reshape(-1, keys.shape[-1]), values.reshape(-1, values.shape[-1])
    outputs = []
    for span in spans:
        start, end = span.first_row, span.end_row
        span_vectors = slice(
            num_heads * span.offset, num_heads * (span.offset + (end - start) * span.capacity)
        )
        shape = (end - start, num_heads, span.capacity, -1)
        outputs.append(
            scaled_dot_product_attention(
                query_NHGD[start:end],
                keys_VD[span_vectors].view(shape),
                values_VD[span_vectors].view(shape),
                attn_mask=mask_N11L[start:end, :, :, : span.capacity],
                scale=scaling,
            )
        )
    output_NHGD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output_NHGD.reshape(num_rows, num_query_heads, 1, values.shape[-1])
