"""Training state of several learner ranks: each writes the rows that it has of every tensor.

`NAME-00001-of-00004.tensors` is the first of four files, in the format of safetensors. Parameters
are divided along their first dimension, so that the rows of a tensor are those of the first file,
of the second, and so on. Any number of ranks reads the rows that it needs. torch.distributed.
checkpoint is not used: it pickles its metadata, on disk and between the ranks.

Shape legend: R ranks.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

SUFFIX = ".tensors"


def save_rows(folder: Path, name: str, tensors: Mapping[str, Tensor], mesh: DeviceMesh) -> None:
    """Writes the rows of this rank, `tensors`. Ranks that have the rows of another one write
    nothing.

    Raises OSError or SafetensorError.
    """
    if not writes_rows(mesh):
        return
    shard, num_shards = mesh.get_local_rank("shard"), mesh.size(mesh.ndim - 1)
    path = folder / f"{name}-{shard + 1:05d}-of-{num_shards:05d}{SUFFIX}"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def writes_rows(mesh: DeviceMesh) -> bool:
    """Whether no other rank writes the same rows."""
    return mesh.ndim == 1 or mesh.get_local_rank("replicate") == 0


def local(tensor: Tensor) -> Tensor:
    """The rows of this rank, without gradient; all rows of a tensor that is not sharded."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class SavedRows:
    """Tensors in the files of one rank or of several."""

    def __init__(self, paths: list[Path]) -> None:
        """`paths` in the order of the ranks. Raises OSError or SafetensorError."""
        self._files = [safe_open(path, "pt") for path in paths]

    def names(self) -> Iterator[str]:
        yield from self._files[0].keys() if self._files else ()

    def like(self, name: str, target: Tensor) -> Tensor:
        """The rows of this tensor that this rank has of `target`, on the CPU. The whole tensor if
        it has no dimensions. Raises SafetensorError for an unknown name, and ValueError for another
        shape."""
        slices = [file.get_slice(name) for file in self._files]
        shapes = [each.get_shape() for each in slices]
        if not shapes[0]:
            return self._files[0].get_tensor(name)
        shape = [sum(each[0] for each in shapes), *shapes[0][1:]]
        if shape != list(target.shape):
            raise ValueError(f"'{name}' has shape {shape}, the model has {list(target.shape)}")
        start, stop = _rows(target)
        parts, first = [], 0
        for each, (num_rows, *_) in zip(slices, shapes, strict=True):
            begin, end = max(start - first, 0), min(stop - first, num_rows)
            if begin < end:
                parts.append(each[begin:end])
            first += num_rows
        return torch.cat(parts) if parts else torch.empty(0, *shape[1:])


def saved_paths(folder: Path, name: str) -> list[Path]:
    """The files of all ranks, in order; that of a single rank; or none."""
    single = folder / f"{name}{SUFFIX}"
    return [single] if single.is_file() else sorted(folder.glob(f"{name}-*-of-*{SUFFIX}"))


def load_parameters(model: nn.Module, saved: nn.Module) -> None:
    """Copies the values of a whole model, except rows of other ranks. Raises RuntimeError."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        model.load_state_dict(saved.state_dict())
        return
    values = dict(saved.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local(parameter).copy_(values[name][slice(*_rows(parameter))])


def load_weights(model: nn.Module, saved: SavedRows) -> None:
    """Copies the saved parameters. Raises KeyError for an unknown name, else as `SavedRows`."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in saved.names():
            local(parameters[name]).copy_(saved.like(name, parameters[name]))


def load_state(optimizer: torch.optim.Optimizer, model: nn.Module, saved: SavedRows) -> None:
    """Inverse of `save_rows` of `named_state`. Raises as `load_weights`."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key in saved.names():
        name, _, slot = key.rpartition(".")
        parameter = parameters[name]
        rows = saved.like(key, parameter)
        value = rows.to(local(parameter).device)
        if isinstance(parameter, DTensor) and rows.dim():
            value = DTensor.from_local(
                value,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        optimizer.state[parameter][slot] = value


def _rows(target: Tensor) -> tuple[int, int]:
    """First row of this rank, and the row after its last. FSDP divides as `torch.chunk` does."""
    num_rows = target.shape[0]
    if not isinstance(target, DTensor):
        return 0, num_rows
    mesh = target.device_mesh
    per_rank = -(-num_rows // mesh.size(mesh.ndim - 1))
    start = min(per_rank * mesh.get_local_rank("shard"), num_rows)
    return start, min(start + per_rank, num_rows)
