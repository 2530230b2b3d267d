"""What a trace of a reload covers, in a model that loads as vLLM's do. The faults that it detects
in vLLM are in tests/integration/test_vllm_engine.py."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speed_async.actors.vllm_engine.held_weights import LoadTrace, verify_held, verify_parts
from speed_async.errors import WeightSyncError
from speed_async.weight_sync.channel import NamedTensor


class Linear(nn.Module):
    def __init__(self, rows: int, quant_method: object = None) -> None:
        super().__init__()
        self.quant_method = quant_method
        self.weight = nn.Parameter(torch.zeros(rows, 3), requires_grad=False)


class Fp8LinearMethod:
    """Has the name of a method of vLLM that quantises."""


class Model(nn.Module):
    """`k` and `v` become rows of `kv`; the decay is the exponential of `a_log`."""

    def __init__(self, quant_method: object = None) -> None:
        super().__init__()
        self.kv = Linear(4, quant_method)
        self.decay = nn.Parameter(torch.zeros(3), requires_grad=False)

    def load_weights(self, tensors: Sequence[NamedTensor]) -> None:
        for name, tensor in tensors:
            if name == "a_log":
                self.decay.data.copy_(tensor.exp())
            elif name != "unknown":
                start = {"k": 0, "v": 2}[name]
                self.kv.weight.data[start : start + 2].copy_(tensor)


def tensors() -> dict[str, Tensor]:
    return {"k": torch.ones(2, 3), "v": torch.full((2, 3), -2.0), "a_log": torch.arange(3.0)}


def loaded(model: Model, **sent: Tensor) -> LoadTrace:
    trace = LoadTrace(model)
    trace.load(model, [*sent.items()])
    return trace


def test_computed_and_unknown_tensors_are_not_compared() -> None:
    model = Model()
    trace = loaded(model, **tensors(), unknown=torch.ones(1))
    assert verify_held(model, trace, policy_version=1) == ("a_log", "unknown")


def test_quantised_tensors_are_not_compared() -> None:
    model = Model(Fp8LinearMethod())
    trace = loaded(model, **tensors())
    model.kv.weight.data.mul_(2)
    assert verify_held(model, trace, policy_version=1) == ("a_log", "k", "v")


@pytest.mark.parametrize(("row", "name"), [(0, "k"), (3, "v")])
def test_each_part_of_a_fused_parameter_is_compared(row: int, name: str) -> None:
    model = Model()
    trace = loaded(model, **tensors())
    model.kv.weight.data[row, 1] += 1e-6
    with pytest.raises(WeightSyncError, match=rf"version 7 .*: 1 of 3 tensors .* '{name}'"):
        verify_held(model, trace, policy_version=7)


def test_a_parameter_that_nothing_was_loaded_into_is_refused() -> None:
    model: Any = Model()
    model.head = Linear(2)
    trace = loaded(model, **tensors())
    with pytest.raises(WeightSyncError, match=r"first 'head\.weight'"):
        verify_held(model, trace, policy_version=1)
    model.head.weight = model.kv.weight  # tied: it is compared as well
    verify_held(model, trace, policy_version=1)


def test_parts_of_all_workers_must_be_the_whole_tensor() -> None:
    first, second = (0, 2, 3, 3, 1), (6, 2, 3, 3, 1)  # two rows each, of (4, 3)
    verify_parts([{"w": (12, [first])}, {"w": (12, [second])}], policy_version=1)
    verify_parts([{"w": (12, [])}, {"w": (12, [])}], policy_version=1)  # not traced
    # As lists, as they arrive from the workers.
    with pytest.raises(WeightSyncError, match="1 of 1 tensors were loaded in part, first 'w'"):
        verify_parts([{"w": (12, [[*first]])}, {"w": (12, [[*first]])}], policy_version=1)
