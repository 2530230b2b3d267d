"""Experts that are one tensor compute in the dtype of autocast, as linear layers do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from speed_async.config.sections.learner import ActivationCheckpointing
from speed_async.learner.model import load_model
from tests.fakes.learner_ranks import save_models

IDS = torch.arange(1, 9)[None]
EXPERTS = "model.layers.0.mlp.experts"


class Products(TorchDispatchMode):
    """Dtypes of the operands of all products of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is torch.ops.aten._grouped_mm.default:
            self.dtypes |= {each.dtype for each in args[:2]}
        return func(*args, **(kwargs or {}))


def gradients(model: nn.Module, *, autocast: bool) -> tuple[dict[str, Any], set[torch.dtype]]:
    products = Products()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), products:
        loss = model(input_ids=IDS).logits.float().square().mean()
    loss.backward()
    return {name: each.grad for name, each in model.named_parameters()}, products.dtypes


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_experts_compute_in_bfloat16_and_have_float32_gradients(
    tmp_path: Path, checkpointing: ActivationCheckpointing
) -> None:
    save_models(tmp_path)
    expected, dtypes = gradients(
        load_model(tmp_path / "experts", device="cpu", activation_checkpointing="none"),
        autocast=False,
    )
    assert dtypes == {torch.float32}
    model = load_model(tmp_path / "experts", device="cpu", activation_checkpointing=checkpointing)
    found, dtypes = gradients(model, autocast=True)
    assert dtypes == {torch.bfloat16}
    assert found.keys() == expected.keys()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert found[name].dtype == torch.float32
    names = [name for name in found if name.startswith(EXPERTS)]
    assert len(names) == 2
    for name in names:
        ours, theirs = (each[name].flatten() for each in (found, expected))
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99
