"""Decode steps of Llama-like models with few operators.

The modules of transformers run about 60 small operators per layer. On a CPU and with few
parameters, launching them costs more than the matrix products. `LlamaDecoder` computes the same
logits with about 20. It reads the parameters of the model, without copies. Projections of the same
input become one matrix product if their weights are adjacent in memory, as after
`flatten_parameters`.

Shape legend: N rows in use, V vocabulary, Q query heads, K key/value heads, D head dimension,
L largest capacity of a block, E hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speed_async.actors.torch_engine.slot_cache import SlotCache, SlotSpan
from speed_async.actors.torch_engine.span_attention import attend

MODEL_TYPES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Projections:
    """Linear layers with the same input: one weight if they are adjacent, otherwise several."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, *linears: Any) -> "_Projections":
        weights = [linear.weight.detach() for linear in linears]
        biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]
        joined = _joined(weights) if not any(bias is not None for bias in biases) else None
        if joined is not None:
            return cls(weights=(joined,), biases=(None,))
        return cls(weights=tuple(weights), biases=tuple(biases))

    def __call__(self, inputs: Tensor) -> Tensor:
        outputs = [
            F.linear(inputs, weight, bias)
            for weight, bias in zip(self.weights, self.biases, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    attention_norm: Tensor
    qkv: _Projections
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: _Projections
    mlp_norm: Tensor
    gate_up: _Projections
    down: _Projections


class LlamaDecoder:
    """The decode step of a model for which `supports` holds. Its parameters may change in place,
    but must stay where they are in memory."""

    def __init__(self, model: Any) -> None:
        config = model.config
        attention = model.model.layers[0].self_attn
        self._head_dim: int = attention.head_dim
        self._scaling: float = attention.scaling
        self._num_query_heads: int = config.num_attention_heads
        self._num_heads: int = config.num_key_value_heads
        self._eps: float = config.rms_norm_eps
        self._embedding = model.model.embed_tokens.weight.detach()
        self._rotary = model.model.rotary_emb
        self._layers = [_layer(layer) for layer in model.model.layers]
        self._norm = model.model.norm.weight.detach()
        self._head = _Projections.of(model.lm_head)

    def __call__(
        self,
        tokens_N: Tensor,
        positions_N: Tensor,
        *,
        mask_NL: Tensor,
        spans: Sequence[SlotSpan],
        cache: SlotCache,
    ) -> Tensor:
        """Logits (N, V) after these tokens; `mask_NL` is additive. Writes their keys and values to
        the cache, whose `begin_decode` returned `spans`."""
        num_rows, num_query_heads = len(tokens_N), self._num_query_heads
        num_rotated = num_query_heads + self._num_heads
        hidden_NE = F.embedding(tokens_N, self._embedding)
        cos_N1D, sin_N1D = self._rotary(hidden_NE[:, None], positions_N[:, None])
        half = self._head_dim // 2
        signed_sin_N1D = torch.cat((-sin_N1D[..., :half], sin_N1D[..., half:]), dim=-1)
        for index, layer in enumerate(self._layers):
            normed_NE = self._normalized(hidden_NE, layer.attention_norm)
            qkv_NHD = layer.qkv(normed_NE).view(num_rows, -1, self._head_dim)
            rotated_NHD = qkv_NHD[:, :num_rotated]
            if layer.query_norm is not None and layer.key_norm is not None:
                rotated_NHD = torch.cat(
                    (
                        self._normalized(rotated_NHD[:, :num_query_heads], layer.query_norm),
                        self._normalized(rotated_NHD[:, num_query_heads:], layer.key_norm),
                    ),
                    dim=1,
                )
            swapped_NHD = torch.cat((rotated_NHD[..., half:], rotated_NHD[..., :half]), dim=-1)
            rotated_NHD = torch.addcmul(rotated_NHD * cos_N1D, swapped_NHD, signed_sin_N1D)
            keys, values = cache.update(
                rotated_NHD[:, num_query_heads:, None], qkv_NHD[:, num_rotated:, None], index
            )
            attended_NQ1D = attend(
                rotated_NHD[:, :num_query_heads, None],
                keys,
                values,
                mask_N11L=mask_NL[:, None, None],
                spans=spans,
                scaling=self._scaling,
            )
            hidden_NE = hidden_NE + layer.output(attended_NQ1D.reshape(num_rows, -1))
            gate_up_N2F = layer.gate_up(self._normalized(hidden_NE, layer.mlp_norm))
            gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
            hidden_NE = hidden_NE + layer.down(F.silu(gate_NF) * up_NF)
        return self._head(self._normalized(hidden_NE, self._norm))

    def _normalized(self, states: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(states, weight.shape, weight, self._eps)


def supports(model: Any) -> bool:
    """Whether the model computes exactly what `LlamaDecoder` does: a known class of transformers,
    full attention in every layer, and SiLU."""
    config = model.config
    name = config.model_type
    return (
        name in MODEL_TYPES
        and type(model).__module__ == f"transformers.models.{name}.modeling_{name}"
        and type(model).__name__.endswith("ForCausalLM")
        and config.hidden_act == "silu"
        and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
    )


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    query_norm, key_norm = (
        getattr(attention, name).weight.detach() if hasattr(attention, name) else None
        for name in ("q_norm", "k_norm")
    )
    return _Layer(
        attention_norm=layer.input_layernorm.weight.detach(),
        qkv=_Projections.of(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=query_norm,
        key_norm=key_norm,
        output=_Projections.of(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_Projections.of(mlp.gate_proj, mlp.up_proj),
        down=_Projections.of(mlp.down_proj),
    )


def _joined(weights: Sequence[Tensor]) -> Tensor | None:
    """One matrix with the rows of all weights, as a view; None if they are not adjacent."""
    first, end = weights[0], weights[0].data_ptr()
    for weight in weights:
        same_storage = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if weight.data_ptr() != end or not same_storage or not weight.is_contiguous():
            return None
        end += weight.nbytes
    num_rows = sum(len(weight) for weight in weights)
    return first.as_strided((num_rows, first.shape[1]), (first.shape[1], 1))
