"""The weights that actors, checkpoints and evaluations see: whole, and merged with adapters."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from speed_async.learner.adapters import AdaptedLinear, is_factor
from speed_async.learner.parallel.sharding import whole


class ModelWeights:
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = {
            name: parameter for name, parameter in model.named_parameters() if not is_factor(name)
        }
        self._adapted = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if isinstance(module, AdaptedLinear)
        }

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Each distinct parameter once, in layer order, without its adapter, valid until the next
        update. A tied parameter has its first name."""
        for name, parameter in self._parameters.items():
            yield name, parameter.detach()

    def whole(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """These as whole tensors with their adapters. Few at a time: sharded and adapted ones are
        copied."""
        return {
            name: self._adapted[name].merged()
            if name in self._adapted
            else whole(self._parameters[name].detach())
            for name in names
        }

    def state(
        self,
        gather: Callable[[Sequence[str]], Mapping[str, Tensor]],
        dtype_of: Callable[[str], torch.dtype],
    ) -> Mapping[str, Tensor]:
        """All tensors of the model by name, copied to the CPU. `gather` is `whole` on all ranks,
        and is asked for one name at a time; parameters get the dtype of their name. Tied ones are
        the same tensor."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        stored = {id_: gather([name])[name].to(dtype_of(name)).cpu() for id_, name in names.items()}
        state: dict[str, Tensor] = self._model.state_dict(keep_vars=True)
        return {
            name: stored[id(tensor)] if id(tensor) in stored else tensor.detach().cpu()
            for name, tensor in state.items()
            if not is_factor(name)
        }
