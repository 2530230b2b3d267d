"""Where the parameters of a policy are: on one device, or sharded over the learner ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel

from speed_async.config.schema import Config
from speed_async.learner.adapters import has_adapters, keeps_bfloat16, restore_bfloat16
from speed_async.learner.checkpoint.dtypes import WeightDtypes
from speed_async.learner.parallel.ranks import Ranks
from speed_async.learner.parallel.sharding import shard
from speed_async.learner.policy import Policy
from speed_async.weight_sync.device import resolve_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How all policies of a trainer are placed."""

    ranks: Ranks
    device: torch.device | None
    """On which they will compute; None: where they are."""
    half_precision: bool
    cpu_offload: bool
    dtype_of: Callable[[str], torch.dtype]
    """Dtype in the model folder of the parameter of this name."""
    keeps_bfloat16: bool
    """Whether frozen weights stay in bfloat16 beside adapters."""

    @classmethod
    def of(
        cls, config: Config, model: PreTrainedModel, *, dtypes: WeightDtypes, ranks: Ranks
    ) -> Self:
        device = ranks.device
        if device is None and has_adapters(model):
            device = resolve_device("learner.device", config.learner.device)
        return cls(
            ranks=ranks,
            device=device,
            half_precision=dtypes.default != torch.float32
            and not config.actors.computes_in_float32,
            cpu_offload=config.learner.cpu_offload,
            dtype_of=dtypes.of,
            keeps_bfloat16=device is not None and keeps_bfloat16(config, device),
        )

    def place(self, policy: Policy) -> None:
        """Moves a policy with adapters, which was loaded in host memory, to the device, with frozen
        weights in their dtypes. Shards any policy if there are several ranks (`shard`)."""
        model = policy.causal_lm
        if self.device is not None and has_adapters(model):
            if self.keeps_bfloat16:
                policy.has_bfloat16 = restore_bfloat16(model, self.dtype_of)
            if self.ranks.mesh is None:
                nn.Module.to(model, self.device)
        shard(policy, self.ranks, half_precision=self.half_precision, cpu_offload=self.cpu_offload)
