"""Prefill and decode steps of Llama-like models with few operators.

The modules of transformers run about 60 small operators per layer. On a CPU and with few
parameters, launching them costs more than the matrix products. `LlamaDecoder` computes the same
with about 20. It reads the parameters of the model, without copies. Projections of the same
input become one matrix product if their weights are adjacent in memory, as after
`flatten_parameters`.

Shape legend: N rows in use, U rows and P positions of a prefill, T tokens (N or U * P), Q query
heads, K key/value heads, H heads of both kinds, D head dimension, E hidden size, F intermediate
size, L largest capacity of a block, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speed_async.actors.torch_engine.slot_blocks import SlotSpan
from speed_async.actors.torch_engine.slot_cache import SlotCache
from speed_async.actors.torch_engine.span_attention import attend

MODEL_TYPES = ("llama", "qwen2", "qwen3")
ROPE_TYPES_BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that depend on the longest sequence of a batch, so not on positions alone."""


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

    def added_to(self, states: Tensor, inputs: Tensor) -> Tensor:
        """`states + self(inputs)`, both (T, features)."""
        if len(self.weights) == 1 and self.biases[0] is None:
            return torch.addmm(states, inputs, self.weights[0].t())
        return states + self(inputs)


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
    """Prefill and decode steps of a model for which `supports` holds. Its parameters may change in
    place, but must stay where they are in memory."""

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
        self._rotations: tuple[Tensor, Tensor] | None = None
        self._layers = [_layer(layer) for layer in model.model.layers]
        self._norm = model.model.norm.weight.detach()
        self._head = _Projections.of(model.lm_head)

    @torch.no_grad()
    def reserve(self, length: int) -> None:
        """Compute the rotary embeddings of positions below `length`."""
        if self._rotary.rope_type in ROPE_TYPES_BY_LENGTH:
            return
        if self._rotations is None or len(self._rotations[0]) < length:
            positions_P = torch.arange(length, device=self._embedding.device)
            self._rotations = self._computed_rotation(positions_P)

    def decode(
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
        hidden_NE = F.embedding(tokens_N, self._embedding)
        rotation = self._rotation(positions_N)
        for index, layer in enumerate(self._layers):
            query_NQD, key_NKD, value_NKD = self._qkv(layer, hidden_NE, rotation)
            keys, values = cache.update(key_NKD[:, :, None], value_NKD[:, :, None], index)
            attended_NQ1D = attend(
                query_NQD[:, :, None],
                keys,
                values,
                mask_N11L=mask_NL[:, None, None],
                spans=spans,
                scaling=self._scaling,
            )
            hidden_NE = self._rest(layer, hidden_NE, attended_NQ1D.flatten(1))
        return self._head(self._normalized(hidden_NE, self._norm))

    def prefill(self, tokens_UP: Tensor, *, cache: SlotCache) -> None:
        """Writes the keys and values of these rows to the cache, after its `begin_prefill`."""
        num_rows, num_positions = tokens_UP.shape
        hidden_TE = F.embedding(tokens_UP.flatten(), self._embedding)
        positions_P = torch.arange(num_positions, device=tokens_UP.device)
        rotation = self._rotation(positions_P.repeat(num_rows))
        for index, layer in enumerate(self._layers):
            query, key, value = (
                states_TXD.view(num_rows, num_positions, -1, self._head_dim).transpose(1, 2)
                for states_TXD in self._qkv(layer, hidden_TE, rotation)
            )
            cache.update(key, value, index)
            if index == len(self._layers) - 1:
                return  # nothing reads what follows
            attended_UQPD = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self._scaling, enable_gqa=True
            )
            attended_TE = attended_UQPD.transpose(1, 2).reshape(len(hidden_TE), -1)
            hidden_TE = self._rest(layer, hidden_TE, attended_TE)

    def _rotation(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines, and sines with the signs of the halves that they multiply, both (T, 1, D)."""
        if self._rotations is None:
            return self._computed_rotation(positions_T)
        cos_P1D, signed_sin_P1D = self._rotations
        return cos_P1D.index_select(0, positions_T), signed_sin_P1D.index_select(0, positions_T)

    def _computed_rotation(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        cos_T1D, sin_T1D = self._rotary(self._embedding, positions_T[:, None])
        half = self._head_dim // 2
        return cos_T1D, torch.cat((-sin_T1D[..., :half], sin_T1D[..., half:]), dim=-1)

    def _qkv(
        self, layer: _Layer, hidden_TE: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, Q, D), keys and values (T, K, D)."""
        normed_TE = self._normalized(hidden_TE, layer.attention_norm)
        qkv_THD = layer.qkv(normed_TE).view(len(hidden_TE), -1, self._head_dim)
        heads = (self._num_query_heads, self._num_heads)
        rotated_THD, value_TKD = qkv_THD.split((sum(heads), self._num_heads), dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query_TQD, key_TKD = rotated_THD.split(heads, dim=1)
            query_TQD = self._normalized(query_TQD, layer.query_norm)
            rotated_THD = torch.cat((query_TQD, self._normalized(key_TKD, layer.key_norm)), dim=1)
        cos_T1D, signed_sin_T1D = rotation
        half = self._head_dim // 2
        swapped_THD = torch.cat((rotated_THD[..., half:], rotated_THD[..., :half]), dim=-1)
        rotated_THD = rotated_THD.mul_(cos_T1D).addcmul_(swapped_THD, signed_sin_T1D)
        query_TQD, key_TKD = rotated_THD.split(heads, dim=1)
        return query_TQD, key_TKD, value_TKD

    def _rest(self, layer: _Layer, hidden_TE: Tensor, attended_TE: Tensor) -> Tensor:
        """The hidden states after the layer."""
        hidden_TE = layer.output.added_to(hidden_TE, attended_TE)
        gate_up_T2F = layer.gate_up(self._normalized(hidden_TE, layer.mlp_norm))
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return layer.down.added_to(hidden_TE, F.silu(gate_TF).mul_(up_TF))

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
