"""Model families whose log-probabilities the learner would compute differently from the engine.

They are recognised from config.json. Values measured with small weights cannot show them: a cap or
a scale changes small logits very little.
"""

from collections.abc import Iterator, Mapping
from typing import Any

CHANGES_LOGITS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
    "lm_head_multiplier",
)
"""Fields that change the logits after the head, unless they are null, 1 or false."""
ATTENTION_CAPS = ("attn_logit_softcapping",)
"""Fields that cap attention scores, which fused attention (SDPA) ignores."""
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Fields with the number of experts that a router chooses from."""
ATTENTION_LAYERS = frozenset(("full_attention", "sliding_attention", "chunked_attention"))
RECURRENT_FIELDS = ("mamba_", "ssm_", "linear_", "state_size")
LONG_ROPE = ("longrope", "su", "dynamic")
"""Rotary embeddings that change for all tokens of a batch when one sequence exceeds a length."""


def family_faults(record: Mapping[str, Any], context_length: int | None) -> Iterator[str]:
    """What makes this model unusable, each with its remedy. `record`: config.json or its text part;
    `context_length`: of the run, None if unknown."""
    another = "choose another model family"
    for name in CHANGES_LOGITS:
        if _is_set(record.get(name)):
            yield (
                f"{name} = {record[name]} changes its logits after the head (scaling or capping), "
                f"which the learner does not compute; {another}"
            )
    for name in ATTENTION_CAPS:
        if _is_set(record.get(name)):
            yield (
                f"{name} = {record[name]} caps its attention scores, which the attention kernels "
                f"of learner and engine (SDPA) ignore; {another}"
            )
    for rope in _rope_parameters(record):
        kind = rope.get("rope_type") or rope.get("type")
        if kind not in LONG_ROPE:
            continue
        limit = _regime_limit(record, rope)
        if limit is None or context_length is None or context_length > limit:
            remedy = f"set model.context_length to at most {limit}" if limit else another
            yield (
                f"its rotary embeddings ({kind}) depend on the longest sequence of a batch beyond "
                f"{limit or 'some'} tokens, so log-probabilities of one completion would depend on "
                f"others; {remedy}"
            )


def routing_notice(record: Mapping[str, Any]) -> str:
    """What training a mixture of experts implies; empty for other models."""
    found = [count for name in NUM_EXPERTS if isinstance(count := record.get(name), int)]
    if max(found, default=0) < 2:
        return ""
    return (
        f"mixture of {max(found)} experts: the learner routes every token anew, without replaying "
        "the experts that the engine chose, so the ratio pi / mu of single tokens can be far from "
        "1 at an unchanged policy; objective.dual_clip and the corrections bound their gradient "
        "(metrics token_weight_max, dual_clipped_share, ratio_max)"
    )


def has_only_attention(record: Mapping[str, Any]) -> bool:
    """Whether no layer has a recurrent state, as those of Mamba and of linear attention."""
    layers = record.get("layer_types") or ()
    return set(layers) <= ATTENTION_LAYERS and not any(
        name.startswith(RECURRENT_FIELDS) for name in record
    )


def _is_set(value: object) -> bool:
    return isinstance(value, int | float) and value not in (0, 1)


def _rope_parameters(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rotary parameters; some models have one set for each type of layers."""
    for name in ("rope_parameters", "rope_scaling"):
        found = record.get(name)
        if isinstance(found, Mapping):
            yield found
            yield from (each for each in found.values() if isinstance(each, Mapping))


def _regime_limit(record: Mapping[str, Any], rope: Mapping[str, Any]) -> int | None:
    """Longest sequence with the original embeddings; None if config.json does not tell."""
    name = "original_max_position_embeddings"
    limit = rope.get(name) or record.get(name)
    if limit is None and "dynamic" in (rope.get("rope_type"), rope.get("type")):
        limit = record.get("max_position_embeddings")
    return limit if isinstance(limit, int) else None
