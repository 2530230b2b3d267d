"""The dtype of each weight in a checkpoint: that of the initial model folder.

The learner trains float32 weights. vLLM loads a float32 folder in another precision than a bfloat16
folder, and needs twice the disk and time to read it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from speed_async.errors import ModelError
from speed_async.learner.adapters import is_factor
from speed_async.learner.checkpoint.model_files import LEGACY_OPTIMIZER_FILE

HALF = {"BF16": torch.bfloat16, "F16": torch.float16}
"""Names in safetensors. Weights of any other dtype are stored in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightDtypes:
    by_name: Mapping[str, torch.dtype]
    default: torch.dtype
    """Of weights that the initial folder has under another name: its most common dtype."""

    def of(self, name: str) -> torch.dtype:
        return self.by_name.get(name, self.default)


def read_dtypes(folder: Path) -> WeightDtypes:
    """Read the headers of a model folder. Raises ModelError."""
    found: dict[str, torch.dtype] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == LEGACY_OPTIMIZER_FILE:
            continue
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    dtype = file.get_slice(name).get_dtype()
                    found[name] = HALF.get(dtype, torch.float32)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"model folder '{folder}': {path.name} cannot be read: {error}") from (
                error
            )
    [(default, _)] = Counter(found.values()).most_common(1) or [(torch.float32, 0)]
    return WeightDtypes(by_name=found, default=default)


def stored_tensors(state: Mapping[str, Tensor], dtypes: WeightDtypes) -> dict[str, Tensor]:
    """`state` in the dtypes of the checkpoint; converted tensors are on the CPU.

    Tensors that share memory (tied weights) still do, and are then written once.
    """
    converted: dict[tuple[int, torch.Size], Tensor] = {}
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not _is_converted(name, tensor, dtypes):
            stored[name] = tensor
            continue
        key = tensor.data_ptr(), tensor.shape
        if key not in converted:
            converted[key] = tensor.detach().to(dtypes.of(name)).cpu()
        stored[name] = converted[key]
    return stored


def master_weights(model: nn.Module, dtypes: WeightDtypes) -> dict[str, Tensor]:
    """The parameters that the checkpoint has in another dtype, as they are trained."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if _is_converted(name, parameter, dtypes)
    }


def tensor_bytes(model: nn.Module, dtypes: WeightDtypes) -> int:
    """Size of the tensors of one checkpoint: the model as it is stored, and for each trained
    parameter AdamW's two moments, and its float32 value if the model has it in another dtype or
    merged."""
    num_bytes = 0
    for name, parameter in model.named_parameters():
        in_model = not is_factor(name)
        per_value = dtypes.of(name).itemsize if in_model else 4
        if parameter.requires_grad:
            per_value += 8 + 4 * (in_model and _is_converted(name, parameter, dtypes))
        num_bytes += per_value * parameter.numel()
    return num_bytes


def _is_converted(name: str, tensor: Tensor, dtypes: WeightDtypes) -> bool:
    return tensor.is_floating_point() and tensor.dtype != dtypes.of(name)
