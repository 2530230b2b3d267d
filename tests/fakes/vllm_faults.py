"""A worker of vLLM in which faults can be made in the weights that it holds after a reload.

What a layer computes with on a CPU is read from its packed weights, changed, and packed again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from speed_async.actors.vllm_engine.worker import WorkerExtension

EXTENSION = f"{__name__}.FaultyWorker"


class FaultyWorker(WorkerExtension):
    def make_fault(self, name: str, worker: int) -> None:
        """In this worker only, and in every update until `end_fault`."""
        engine: Any = self.weight_transfer_engine
        if engine.parallel_config.rank != worker:
            return
        fault = FAULTS[name](engine)
        finish = engine._finish_reload

        def finish_with_fault() -> None:
            finish()
            fault()

        engine._finish_reload = finish_with_fault

    def end_fault(self) -> None:
        engine: Any = self.weight_transfer_engine
        engine.__dict__.pop("_finish_reload", None)
        engine.__dict__.pop("_refresh_tied_head", None)
        _weight_before_loading(engine).tp_rank = engine.parallel_config.rank
        model = engine.model
        if engine.model_config.hf_config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight


Fault = Callable[[], None]


def _weight_before_loading(engine: Any) -> Any:
    parameters, _ = get_layerwise_info(engine.model.model.layers[1].mlp.down_proj).restore_metadata
    return parameters["weight"]


def one_ulp(engine: Any) -> Fault:
    def add() -> None:
        engine.model.model.norm.weight.data.view(torch.int32)[-1] += 1

    return add


def stale(engine: Any) -> Fault:
    """The rows of `k_proj`, and no others."""
    layer = engine.model.model.layers[0].self_attn
    rows = slice(layer.q_size, layer.q_size + layer.kv_size)
    old = held(layer.qkv_proj)[rows]

    def keep(weight: Tensor) -> None:
        weight[rows] = old

    return lambda: change(layer.qkv_proj, keep)


def transposed(engine: Any) -> Fault:
    def transpose(weight: Tensor) -> None:
        weight.copy_(weight.t().reshape(weight.shape))

    return lambda: change(engine.model.model.layers[0].self_attn.o_proj, transpose)


def swapped(engine: Any) -> Fault:
    """`gate_proj` and `up_proj`."""

    def swap(weight: Tensor) -> None:
        weight.copy_(weight.roll(len(weight) // 2, 0))

    return lambda: change(engine.model.model.layers[1].mlp.gate_up_proj, swap)


def wrong_shard(engine: Any) -> Fault:
    """The worker loads the shard of worker 0."""
    _weight_before_loading(engine).tp_rank = 0
    return lambda: None


def expert(engine: Any) -> Fault:
    """The last expert of the last layer, to which no token of the canary is routed."""
    experts = engine.model.model.layers[1].mlp.experts
    weights = dict(experts.named_parameters())
    [w2] = [each for name, each in weights.items() if name.endswith("w2_weight")]
    return lambda: w2.data[-1].zero_()


def old_packed_head(engine: Any) -> Fault:
    engine._refresh_tied_head = lambda: None
    return lambda: None


def untied_head(engine: Any) -> Fault:
    head = engine.model.lm_head
    head.weight = nn.Parameter(head.weight.data.clone(), requires_grad=False)
    return lambda: None


FAULTS: dict[str, Callable[[Any], Fault]] = {
    fault.__name__: fault
    for fault in (
        one_ulp,
        stale,
        transposed,
        swapped,
        wrong_shard,
        expert,
        old_packed_head,
        untied_head,
    )
}


def held(layer: Any) -> Tensor:
    return layer.cpu_linear(torch.eye(layer.input_size_per_partition), layer.weight, None).t()


def change(layer: Any, edit: Callable[[Tensor], None]) -> None:
    weight = held(layer).contiguous()
    edit(weight)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.quant_method.process_weights_after_loading(layer)
