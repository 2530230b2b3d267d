"""Decode attention that reads only what is there: grouped heads, and rows in spans of one length.

Decoding one token a row is bound by reading keys and values. The stock path repeats them for
grouped-query models, and attends with every row over the longest row's length.

Shape legend: N rows in use, Q query heads, H key/value heads, G = Q / H query heads sharing one,
L attended positions, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from speed_async.actors.slots import Span

SPANS_KEYWORD = "slot_spans"
"""Passed to the model's forward, which hands it on to every attention layer."""

_IMPLEMENTATION = "speed_async_spans"
_UNDERSTOOD = {"dropout", "sliding_window", "position_ids", "use_cache", "is_causal"}


def attend_by_span(model: Any) -> bool:
    """Make a model that uses SDPA attend through `span_attention`; False when it cannot.

    Forward passes without spans compute what they did before.
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
    slot_spans: list[Span] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query (N, Q, 1, D) over key and value (N, H, L, D): (N, 1, Q, D).

    `attention_mask` is additive, (N, 1, 1, L). Each span (first row, end row, length) attends
    over its own length. Without spans, or with keywords it does not know, it is plain SDPA.
    """
    unknown = {name for name, given in kwargs.items() if given is not None} - _UNDERSTOOD
    if slot_spans is None or attention_mask is None or unknown:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    num_rows, num_query_heads, _, dim = query.shape
    num_heads = key.shape[1]
    # Query heads that share keys take the place of query positions: no key is repeated.
    query_NHGD = query.reshape(num_rows, num_heads, num_query_heads // num_heads, dim)
    outputs = [
        scaled_dot_product_attention(
            query_NHGD[start:end],
            key[start:end, :, :length],
            value[start:end, :, :length],
            attn_mask=attention_mask[start:end, :, :, :length],
            scale=scaling,
        )
        for start, end, length in slot_spans
    ]
    output_NHGD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output_NHGD.reshape(num_rows, 1, num_query_heads, value.shape[-1]), None
