"""Whether the parameters that a vLLM worker holds after a reload are the tensors it received.

vLLM fuses tensors, shards them over its workers, and repacks them for kernels. `LoadTrace` records
each copy of a part of a received tensor into a part of a parameter, with the digest of the part.
After the reload, `verify_held` compares it with the digest of what the model holds there. Together
with two other comparisons, this extends to the learner:

    learner's tensor = received tensor           digests.verify_digests, in each worker
    received parts = held parts                  `verify_held`, in each worker
    parts of all workers = the whole tensor      `verify_parts`, in the engine

Does not import vLLM.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from speed_async.errors import WeightSyncError
from speed_async.weight_sync.channel import NamedTensor
from speed_async.weight_sync.digests import REMEDY, tensor_digests

Part = tuple[int, ...]
"""A view of a tensor: offset, sizes and strides, in elements of its storage."""
LoadedParts = Mapping[str, tuple[int, Sequence[Sequence[int]]]]
"""By received tensor: its number of elements, and its parts that a worker has loaded."""

KEEPS_LAYOUT = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
"""Methods of vLLM that leave loaded parameters as they are, except on a CPU (`_held`)."""
EXPERTS_METHOD = "UnquantizedFusedMoEMethod"
EXPERTS_KEEP_LAYOUT = ("TRITON", "BATCHED_TRITON", "CPU")
"""Kernels of this method that leave loaded parameters as they are. On a CPU, the experts are packed
after the verification (`worker.ReceivingEngine`)."""
NEVER_LOADED = ("e_score_correction_bias",)
"""Parameters of vLLM that are buffers of the learner: it neither trains nor sends them."""


@dataclass(frozen=True, slots=True)
class _Load:
    source: str
    digest: int  # of the part of the source, in the dtype of the parameter


class LoadTrace:
    """The copies of one reload."""

    def __init__(self, model: nn.Module) -> None:
        """`model` has its parameters in the layout in which they are loaded."""
        self.layouts: dict[str, tuple[torch.Size, tuple[int, ...]]] = {}
        """Shape and strides of each parameter."""
        self.loads: dict[str, dict[Part, _Load]] = {}
        """By parameter and part of it."""
        self.computed: set[str] = set()
        """Parameters into which something else than a part of a received tensor was copied."""
        self.sources: dict[str, tuple[int, set[Part]]] = {}
        """As `LoadedParts`."""
        self._parameters: dict[int, tuple[str, Tensor]] = {}  # kept alive: keys stay unique
        for name, parameter in model.named_parameters():
            self.layouts[name] = parameter.shape, parameter.stride()
            self._parameters[_storage(parameter)] = name, parameter

    def load(self, model: Any, tensors: Sequence[NamedTensor]) -> None:
        """Calls `model.load_weights`."""
        copies = _Copies(self._parameters.keys())
        with copies:
            model.load_weights(tensors)
        names = {_storage(tensor): name for name, tensor in tensors}
        self.sources |= {name: (tensor.numel(), set()) for name, tensor in tensors}
        traced: list[tuple[dict[Part, _Load], Part, str, Tensor]] = []
        for target, source in copies.pairs:
            parameter, _ = self._parameters[_storage(target)]
            name = names.get(_storage(source))
            if name is None:
                self.computed.add(parameter)
                continue
            self.sources[name][1].add(_part(source))
            loads = self.loads.setdefault(parameter, {})
            traced.append((loads, _part(target), name, source.to(target.dtype)))
        digests = _digests(source for *_, source in traced)
        for (loads, part, name, _), digest in zip(traced, digests, strict=True):
            loads[part] = _Load(name, digest)


@torch.no_grad()
def verify_held(model: nn.Module, trace: LoadTrace, *, policy_version: int) -> tuple[str, ...]:
    """Compares all parts that were loaded with what `model` holds.

    Returns the received tensors that could not be compared: their parameters are quantised, in the
    layout of a kernel, or computed from the tensor, or they were not loaded in this worker.
    Raises WeightSyncError with the number of tensors that differ and the name of the first, also
    for a parameter that nothing was loaded into: it is still that of the model folder.
    """
    untraced = {name for name, (_, parts) in trace.sources.items() if not parts}
    differing: dict[str, None] = {}  # ordered
    expected: list[_Load] = []

    def held_parts() -> Iterator[Tensor]:
        for module, name, traced, parameter in _parameters(model, trace):
            loads = trace.loads.get(traced, {})
            held = None if traced in trace.computed else _held(module, parameter, trace, traced)
            if held is None:
                untraced.update(load.source for load in loads.values())
                continue
            if not loads and not name.endswith(NEVER_LOADED):
                differing[name] = None
            for each in held:
                expected.extend(loads.values())
                yield from (_view(each, part) for part in loads)

    digests = _digests(held_parts())
    for load, digest in zip(expected, digests, strict=True):
        if load.digest != digest:
            differing[load.source] = None
    if differing:
        raise _refusal(policy_version, differing, len(trace.sources), "differ in what vLLM holds")
    return tuple(sorted(untraced))


def verify_parts(workers: Sequence[LoadedParts], *, policy_version: int) -> None:
    """Compares the parts that all workers have loaded with whole tensors.

    Raises WeightSyncError for tensors that were loaded in part, such as a shard that two workers
    have loaded in place of two shards.
    """
    incomplete = []
    for name, (num_elements, _) in workers[0].items():
        parts = {tuple(part) for loaded in workers for part in loaded[name][1]}
        if parts and sum(map(_num_elements, parts)) < num_elements:
            incomplete.append(name)
    if incomplete:
        raise _refusal(policy_version, incomplete, len(workers[0]), "were loaded in part")


class _Copies(TorchDispatchMode):
    """Records target and source of each copy into one of the storages from another one."""

    def __init__(self, storages: Iterable[int]) -> None:
        super().__init__()
        self._storages = storages
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            if _storage(target) in self._storages and _storage(source) != _storage(target):
                self.pairs.append((target, source))
        return func(*args, **(kwargs or {}))


def _parameters(model: nn.Module, trace: LoadTrace) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """Module, name, name in `trace`, and value of each parameter; tied ones once per module."""
    held = [
        (module, f"{prefix}.{name}" if prefix else name, parameter)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    names = {_storage(each): name for _, name, each in held if name in trace.loads}
    for module, name, parameter in held:
        yield module, name, names.get(_storage(parameter), name), parameter


def _held(
    module: nn.Module, parameter: Tensor, trace: LoadTrace, traced: str
) -> list[Tensor] | None:
    """What the module computes with, in the layout in which it is loaded; None if it has another.

    On a CPU, vLLM packs the weights of linear layers and heads into an opaque object. These are
    read back exactly: as the product with the identity matrix.
    """
    method: Any = getattr(module, "quant_method", None)
    kind = type(method).__name__
    if kind == EXPERTS_METHOD:
        if method.unquantized_backend.name not in EXPERTS_KEEP_LAYOUT:
            return None
    elif method is not None and kind not in KEEPS_LAYOUT:
        return None
    if traced not in trace.layouts:  # made from the loaded parameters
        return None
    shape, strides = trace.layouts[traced]
    held = [parameter] if parameter.shape == shape else []
    packed: Any = getattr(module, "cpu_linear", None)
    if packed is not None and parameter is getattr(module, "weight", None):
        identity = torch.eye(shape[1], dtype=parameter.dtype)
        held.append(packed(identity, parameter, None).t())
    return [_with_strides(each, strides) for each in held] or None


def _with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(
        tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def _digests(tensors: Iterable[Tensor]) -> list[int]:
    # Zeros lose their sign when they are read back from packed weights.
    named = ((str(i), each + 0.0 if each.is_cpu else each) for i, each in enumerate(tensors))
    return list(tensor_digests(named).values())


def _storage(tensor: Tensor) -> int:
    """Identifies the storage also on the meta device, where it has no address of data."""
    return tensor.untyped_storage()._cdata


def _part(tensor: Tensor) -> Part:
    return int(tensor.storage_offset()), *tensor.shape, *tensor.stride()


def _view(tensor: Tensor, part: Part) -> Tensor:
    num_dims = (len(part) - 1) // 2
    offset = tensor.storage_offset() + part[0]
    return tensor.as_strided(part[1 : 1 + num_dims], part[1 + num_dims :], offset)


def _num_elements(part: Part) -> int:
    return math.prod(part[1 : (len(part) + 1) // 2])


def _refusal(
    policy_version: int, names: Iterable[str], num_tensors: int, fault: str
) -> WeightSyncError:
    first, *others = names
    return WeightSyncError(
        f"policy version {policy_version} is refused, its digest failed: {1 + len(others)} of "
        f"{num_tensors} tensors {fault}, first '{first}'; {REMEDY}"
    )
