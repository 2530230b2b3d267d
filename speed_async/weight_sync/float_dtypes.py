"""Dtypes of the floating-point tensors that receivers load; the sender converts to them.

An engine may load another dtype than the one stored in the model folder: on a GPU, vLLM loads a
float32 folder as bfloat16, and transformers keeps single modules in float32. Every receiver states
its dtypes when it joins an epoch.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from speed_async.errors import WeightSyncError

NAMES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FloatDtypes:
    """`common` for all floating-point tensors, except those in `others`; None keeps their dtype."""

    common: torch.dtype | None = None
    others: Mapping[str, torch.dtype] = field(default_factory=dict)

    def of(self, name: str, tensor: Tensor) -> torch.dtype:
        """Dtype in which this tensor is sent."""
        if not tensor.is_floating_point():
            return tensor.dtype
        return self.others.get(name) or self.common or tensor.dtype


def float_dtypes(expected: Sequence[tuple[str, Tensor]]) -> FloatDtypes:
    """Dtypes of a receiver's tensors. Dtypes that a sender cannot convert to are omitted; the
    manifest then shows the difference."""
    known = set(NAMES.values())
    dtypes = {name: tensor.dtype for name, tensor in expected if tensor.dtype in known}
    if not dtypes:
        return FloatDtypes()
    [(common, _)] = Counter(dtypes.values()).most_common(1)
    return FloatDtypes(
        common=common, others={name: each for name, each in dtypes.items() if each != common}
    )


def encode_dtypes(dtypes: FloatDtypes) -> str:
    return json.dumps(
        {
            "common": None if dtypes.common is None else _name(dtypes.common),
            "others": {name: _name(dtype) for name, dtype in dtypes.others.items()},
        }
    )


def decode_dtypes(text: str) -> FloatDtypes:
    """Raises WeightSyncError for anything malformed."""
    try:
        match json.loads(text):
            case {"common": None | str() as common, "others": dict(others)}:
                return FloatDtypes(
                    common=None if common is None else NAMES[common],
                    others={str(name): NAMES[each] for name, each in others.items()},
                )
            case _:
                pass
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise WeightSyncError(f"a receiver states malformed dtypes: {text[:200]}")


def agreed_dtypes(by_rank: Mapping[int, FloatDtypes]) -> FloatDtypes:
    """The dtypes that all receivers state. Raises WeightSyncError naming two that differ: all load
    the same bytes."""
    [(first_rank, first), *rest] = by_rank.items()
    for rank, dtypes in rest:
        if dtypes != first:
            names = sorted(set(first.others) ^ set(dtypes.others))
            raise WeightSyncError(
                f"rank {first_rank} loads {_describe(first)} and rank {rank} "
                f"{_describe(dtypes)}{f', which differ in {names[0]!r}' if names else ''}: all "
                "actors must load one dtype; run them on one kind of device (actors.device), or "
                "set 'dtype' in actors.vllm.arguments",
                missing_ranks=[rank],
            )
    return first


def _describe(dtypes: FloatDtypes) -> str:
    return "no floating-point tensors" if dtypes.common is None else _name(dtypes.common)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
