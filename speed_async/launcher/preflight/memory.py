"""Estimates the memory of weights, gradients, optimiser state and KV cache.

learner    16 bytes per parameter, over all learner ranks: float32 weights, gradients and two
           moments of AdamW; 4 more for the reference model of a KL divergence. With
           adapters (LoRA) 4, or 2 for a bfloat16 model on a GPU, and 16 per parameter of the
           adapters
actor      weights (float32 on a CPU, the stored dtype on a GPU), and a KV cache of
           slots x context tokens x 2 x layers x KV heads x head size values; the torch engine on a
           CPU has more slots, to move rows (actors/torch_engine/cache_size.py)
Not included: activations, logits and the code of the processes (about 1 GiB each with torch).
"""

from speed_async.actors.torch_engine.cache_size import cache_layout
from speed_async.config.schema import Config
from speed_async.launcher.gpus import num_local_learners
from speed_async.launcher.preflight.devices import why_no_gpu
from speed_async.launcher.preflight.findings import Findings
from speed_async.launcher.preflight.host_memory import host_memory
from speed_async.launcher.preflight.machine import size
from speed_async.launcher.preflight.memory_budget import (
    MASTER_BYTES,
    MOMENTS_BYTES,
    adapter_parameters,
)
from speed_async.launcher.preflight.model import CheckedModel
from speed_async.launcher.preflight.shared_gpu import (
    DTYPE_BYTES,
    frozen_value_bytes,
    model_sizes,
)
from speed_async.launcher.preflight.weights import Weights
from speed_async.launcher.rank import Rank
from speed_async.learner.limits import num_shards

LEARNER_BYTES = 2 * MASTER_BYTES + MOMENTS_BYTES
CHECKPOINT_BYTES = MASTER_BYTES + MOMENTS_BYTES
"""Per parameter: a float32 weight and the optimiser's two moments. A folder with smaller weights
has these too."""


def estimate_memory(
    config: Config, model: CheckedModel, findings: Findings, *, rank: Rank
) -> list[str]:
    """Return lines with the estimate; warn if a machine without a GPU has less memory, or less than
    the learners of the node of `rank` keep in it."""
    if model.weights is None:
        return []
    on_gpu = not why_no_gpu()
    has_reference = config.objective.kl_coefficient > 0
    num_adapted = num_adapter_parameters(config, model)
    if config.learner.lora_rank:
        on_cpu = not on_gpu or config.learner.device == "cpu"
        bytes_each = (
            MASTER_BYTES if on_cpu else frozen_value_bytes(config, model.facts, model.weights)
        )
        learner_bytes = bytes_each * model.weights.num_parameters + LEARNER_BYTES * num_adapted
        parts = f"{bytes_each} bytes per parameter, and {LEARNER_BYTES} per one of the adapters"
        parts += "" if num_adapted else ", whose number is unknown and not included"
    else:
        bytes_each = LEARNER_BYTES + MASTER_BYTES * has_reference
        learner_bytes = bytes_each * model.weights.num_parameters
        parts = f"{bytes_each} bytes per parameter: weights, gradients, two moments"
        parts += ", reference model" if has_reference else ""
    value_bytes = MASTER_BYTES
    actor_on_gpu = on_gpu and config.actors.device != "cpu"
    if actor_on_gpu:
        value_bytes = DTYPE_BYTES.get(model.facts.dtype or "", MASTER_BYTES)
    weight_bytes = value_bytes * model.weights.num_parameters
    kv_bytes = _kv_bytes(config, model, value_bytes, on_gpu=actor_on_gpu)
    learners = config.cluster.learners
    lines = [
        f"model: {model.weights.num_parameters:,} parameters, {size(model.weights.num_bytes)} of "
        f"weights ({model.facts.dtype or 'dtype not specified'})",
        f"learner: about {size(learner_bytes)} ({parts})"
        + (f", divided over {learners} ranks" if learners > 1 else ""),
    ]
    cache = "a KV cache of unknown size"
    if config.actors.engine == "vllm" and on_gpu:
        share = config.actors.vllm.memory_share
        cache = f"vLLM uses {share:.0%} of the memory of GPUs that it does not share"
    elif kv_bytes is not None:
        cache = (
            f"at most {size(kv_bytes)} of KV cache ({config.actors.num_slots} slots x "
            f"{model.context_length} tokens)"
        )
    lines.append(f"each actor: {size(weight_bytes)} of weights, and {cache}")
    lines.append("not included: activations, logits and about 1 GiB per process")
    if not on_gpu:
        actor_bytes = weight_bytes + (kv_bytes or 0)
        _check_available(
            learner_bytes + config.cluster.actors * actor_bytes,
            findings,
            "weights, optimiser and KV caches",
            "reduce actors.slots, model.context_length or cluster.actors",
        )
    elif config.learner.cpu_offload and learners > 1:
        shards = num_shards(learners, ranks_per_node=rank.local_world_size)
        kept_bytes = learner_bytes * num_local_learners(config, rank) // shards
        if rank.is_on_first_node:  # whose learner has the whole model at the start
            kept_bytes += MASTER_BYTES * model.weights.num_parameters
        _check_available(
            kept_bytes,
            findings,
            "what learners keep in host memory",
            "unset learner.cpu_offload, or divide the learners over more nodes",
        )
    return lines


def num_adapter_parameters(config: Config, model: CheckedModel) -> int:
    """0 without adapters (LoRA), or if config.json leaves a size to the model class."""
    if model.weights is None or not config.learner.lora_rank:
        return 0
    sizes = model_sizes(model.facts, model.weights.num_parameters)
    return 0 if sizes is None else adapter_parameters(sizes, config.learner.lora_rank)


def checkpoint_bytes(config: Config, model: CheckedModel, weights: Weights) -> int:
    """Disk space of one checkpoint."""
    if config.learner.lora_rank:
        return weights.num_bytes + CHECKPOINT_BYTES * num_adapter_parameters(config, model)
    is_smaller = weights.num_bytes < MASTER_BYTES * weights.num_parameters
    return CHECKPOINT_BYTES * weights.num_parameters + is_smaller * weights.num_bytes


def _kv_bytes(config: Config, model: CheckedModel, value_bytes: int, *, on_gpu: bool) -> int | None:
    actors = config.actors
    if actors.vllm.kv_cache_bytes is not None and actors.engine == "vllm":
        return actors.vllm.kv_cache_bytes
    values = model.facts.kv_values_per_token
    if values is None or model.context_length is None:
        return None
    if actors.engine == "torch":
        layout = cache_layout(actors.num_slots, in_blocks=not on_gpu)
        return value_bytes * values * layout.num_positions(model.context_length)
    return value_bytes * values * actors.num_slots * model.context_length


def _check_available(needed_bytes: int, findings: Findings, what: str, remedy: str) -> None:
    memory = host_memory()
    if memory is not None and needed_bytes > memory.available_bytes:
        findings.warnings.append(
            f"the run may need more memory than is available: about {size(needed_bytes)} for "
            f"{what}, and {size(memory.available_bytes)} are free; {remedy}"
        )
