"""Low-rank adapters (LoRA): frozen weights W, trained factors A and B, and W + s B A in use.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685),
equation 3, with s = alpha / rank. Adapters have the names and the initial values of peft: A is
uniform as the weights of a new linear layer, B is zero, so training begins at the given model.
Embeddings, head, norms, biases and routers stay as they are, and so do experts that are one tensor.
The factors are float32. On a GPU, frozen weights that the folder has in bfloat16 stay so: half
the memory, and no copies for the forward pass. The sum W + s B A is rounded once, for the engines.

Shape legend: R rank, I inputs, O outputs.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from speed_async.config.schema import Config
from speed_async.config.sections.learner import LearnerConfig
from speed_async.errors import ModelError
from speed_async.learner.parallel.sharding import whole

FACTORS = ("lora_A", "lora_B")


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter: `weight` (O, I) frozen, `lora_A` (R, I), `lora_B` (O, R)."""

    def __init__(
        self, linear: nn.Linear, *, rank: int, scale: float, random: torch.Generator
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        a_RI, b_OR = torch.empty(rank, self.in_features), torch.zeros(self.out_features, rank)
        nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=random)
        self.lora_A = nn.Parameter(a_RI.to(self.weight.device))
        self.lora_B = nn.Parameter(b_OR.to(self.weight.device))
        self.scale = scale
        self.is_active = True

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if not self.is_active:
            return output
        return output + self.scale * F.linear(F.linear(input, self.lora_A), self.lora_B)

    def merged(self) -> Tensor:
        """W + s B A (O, I), float32, whole also when the parameters are sharded."""
        with torch.no_grad():
            return whole(self.weight) + self.scale * (whole(self.lora_B) @ whole(self.lora_A))


def add_adapters(model: PreTrainedModel, config: LearnerConfig, *, seed: int) -> None:
    """Freezes all parameters, and adds an adapter to each linear layer of the base model. Does
    nothing if `learner.lora_rank` is 0.

    All learner ranks get equal adapters. Raises ModelError for a model without linear layers.
    """
    if not config.lora_rank:
        return
    model.requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    linears = [
        (name, module)
        for name, module in model.base_model.named_modules()
        if type(module) is nn.Linear  # a router that inherits from it computes something else
    ]
    if not linears:
        raise ModelError(f"{type(model).__name__} has no linear layers: set learner.lora_rank to 0")
    scale = config.lora_alpha / config.lora_rank
    for name, linear in linears:
        adapted = AdaptedLinear(linear, rank=config.lora_rank, scale=scale, random=random)
        model.base_model.set_submodule(name, adapted)


def keeps_bfloat16(config: Config, device: torch.device) -> bool:
    """Whether frozen weights stay in bfloat16: on a GPU, unless engines compute in float32, whose
    canary is compared at a precision that bfloat16 does not reach."""
    return device.type == "cuda" and not config.actors.computes_in_float32


def restore_bfloat16(model: nn.Module, dtype_of: Callable[[str], torch.dtype]) -> bool:
    """Converts the frozen parameters in place whose dtype in the model folder, `dtype_of` their
    name, is bfloat16. They had their values from there. Returns whether there are any."""
    is_any = False
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and dtype_of(name) == torch.bfloat16:
            parameter.data = parameter.data.to(torch.bfloat16)
            is_any = True
    return is_any


def is_factor(name: str) -> bool:
    return name.rpartition(".")[2] in FACTORS


def has_adapters(model: nn.Module) -> bool:
    return any(isinstance(module, AdaptedLinear) for module in model.modules())


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The given model, which is the reference policy of a run with adapters."""
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    for module in adapted:
        module.is_active = False
    try:
        yield
    finally:
        for module in adapted:
            module.is_active = True
