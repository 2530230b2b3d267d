"""The bytes of the tensors that are alive at the same time, as a caching allocator would count."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts tensors that operators create within this context, also those of the backward pass.

    Memory that an operator frees before it returns is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.calls: Counter[str] = Counter()
        """Calls of each operator, by its name without overload."""
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.calls[func.name().partition(".")[0]] += 1
        result = func(*args, **(kwargs or {}))
        self._forget_freed()
        given = {_reference(tensor).cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            reference = _reference(tensor)
            if reference.cdata not in given:  # neither a view nor changed in place
                self._alive[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self._sum())
        return result

    def now(self) -> int:
        """Bytes that are alive now."""
        self._forget_freed()
        return self._sum()

    def _sum(self) -> int:
        return sum(num_bytes for _, num_bytes in self._alive.values())

    def _forget_freed(self) -> None:
        self._alive = {key: pair for key, pair in self._alive.items() if not pair[0].expired()}


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _reference(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())
