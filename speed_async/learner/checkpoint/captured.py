"""The state of a checkpoint at one update, which is written while training continues."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from speed_async.learner.adapters import has_adapters
from speed_async.learner.checkpoint.dtypes import WeightDtypes, master_weights
from speed_async.learner.checkpoint.shards import SUFFIX, local, save_rows, writes_rows
from speed_async.learner.optimizer import named_state

MASTER, OPTIMIZER = "weights", "optimizer"
TrainingTensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors of the training state that one rank writes, by file (MASTER, OPTIMIZER) and name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Captured:
    model: Mapping[str, Tensor]
    """The whole model by name; tied weights share memory."""
    training: TrainingTensors
    random: dict[str, object]
    """`random_states`."""


def capture_model(model: nn.Module, dtypes: WeightDtypes, *, copy: bool) -> dict[str, Tensor]:
    """The tensors by name; with `copy`, copies on the CPU in the dtypes of the checkpoint."""
    state: dict[str, Tensor] = model.state_dict()
    if not copy:
        return state
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    for name, tensor in state.items():
        dtype = dtypes.of(name) if tensor.is_floating_point() else tensor.dtype
        key = tensor.data_ptr(), tensor.shape
        if key not in copies:
            copies[key] = tensor.to("cpu", dtype, copy=True)
        state[name] = copies[key]
    return state


def capture_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dtypes: WeightDtypes,
    mesh: DeviceMesh | None,
    *,
    copy: bool,
) -> TrainingTensors:
    """With `mesh`, the rows of this rank, of all trained parameters in float32."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if mesh is not None:
        weights = trained if writes_rows(mesh) else {}
    elif has_adapters(model):
        weights = {name: each.detach() for name, each in trained.items()}
    else:
        weights = master_weights(model, dtypes)
    moments = named_state(optimizer, model) if mesh is None or weights else {}
    return {
        file: {
            name: local(tensor).to("cpu", copy=True) if copy else local(tensor)
            for name, tensor in tensors.items()
        }
        for file, tensors in ((MASTER, weights), (OPTIMIZER, moments))
    }


def write_training(folder: Path, captured: TrainingTensors, mesh: DeviceMesh | None) -> None:
    """Raises OSError."""
    try:
        for file, tensors in captured.items():
            if mesh is not None:
                save_rows(folder, file, tensors, mesh)
            elif tensors or file == OPTIMIZER:
                contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
                save_file(contiguous, folder / f"{file}{SUFFIX}")
    except SafetensorError as error:  # raised by the safetensors writer on a full disk
        raise OSError(f"'{folder}' cannot be written: {error}") from error
