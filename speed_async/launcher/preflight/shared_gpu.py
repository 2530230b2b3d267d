"""GPUs of learners, and those that actors share: whether all fits, and each engine's part.

Each node checks its own GPUs. Each actor rank computes its part at its start, so the configuration
of the run has only what the user set.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from speed_async.actors.torch_engine.cache_size import cache_layout
from speed_async.config.cuda import gpu_memory_bytes
from speed_async.config.local_model import model_folder
from speed_async.config.model_facts import ModelInfo, read_model_info
from speed_async.config.model_family import has_only_attention
from speed_async.config.schema import Config
from speed_async.errors import ConfigError
from speed_async.launcher.gpus import actor_gpus, local_actor_gpus, num_local_learners
from speed_async.launcher.preflight.findings import Findings
from speed_async.launcher.preflight.machine import size
from speed_async.launcher.preflight.memory_budget import (
    COMPUTE_BYTES,
    KV_CACHE,
    MASTER_BYTES,
    MemoryBudget,
    ModelSizes,
    Workload,
    memory_budget,
)
from speed_async.launcher.preflight.weights import Weights, read_weights
from speed_async.launcher.rank import Rank
from speed_async.learner.limits import num_shards

ASSUMED_PROMPT_TOKENS = 1024
"""Longest prompt if `task.max_prompt_tokens` does not limit it."""
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
HALF = ("BF16", "F16")
"""Dtypes of weight files whose weights the learner gathers in bfloat16."""


def shared_gpu_budgets(
    config: Config, facts: ModelInfo, weights: Weights, *, gpu_bytes: Sequence[int], rank: Rank
) -> dict[int, MemoryBudget]:
    """The budget of each GPU of a node that has a learner or several engines, by its index.

    `gpu_bytes`: memory of each visible GPU. `rank`: any of the node. Empty if config.json leaves
    sizes to the model class.
    """
    sizes = model_sizes(facts, weights.num_parameters)
    if sizes is None or not gpu_bytes or config.actors.engine == "scripted":
        return {}
    uses_cuda = config.actors.engine == "vllm" or config.actors.device != "cpu"
    actors = local_actor_gpus(config, rank, len(gpu_bytes)) if uses_cuda else []
    engines = Counter(gpu for gpus in actors for gpu in set(gpus))
    num_learners = 0 if config.learner.device == "cpu" else num_local_learners(config, rank)
    load = workload(config, facts, weights, num_local_ranks=rank.local_world_size)
    return {
        gpu: memory_budget(
            sizes,
            load,
            has_learner=gpu < num_learners,
            num_engines=engines[gpu],
            total_bytes=total_bytes,
        )
        for gpu, total_bytes in enumerate(gpu_bytes)
        if gpu < num_learners or engines[gpu] > 1
    }


def check_shared_gpus(
    config: Config, facts: ModelInfo, weights: Weights, findings: Findings, *, rank: Rank
) -> list[str]:
    """Returns lines with the budgets of the node of `rank`; reports an error for one that does not
    fit."""
    budgets = shared_gpu_budgets(config, facts, weights, gpu_bytes=gpu_memory_bytes(), rank=rank)
    for gpu, budget in budgets.items():
        if (fault := budget_fault(config, gpu, budget)) is not None:
            findings.errors.append(fault)
    if budgets:
        return [describe(config, gpu, budget) for gpu, budget in budgets.items()]
    sizes = model_sizes(facts, weights.num_parameters)
    if sizes is None or config.actors.engine == "scripted" or not num_local_learners(config, rank):
        return []
    load = workload(config, facts, weights, num_local_ranks=rank.local_world_size)
    one = memory_budget(sizes, load, has_learner=True, num_engines=1, total_bytes=0)
    alone = replace(one, num_engines=0)
    return [
        f"a GPU that a learner shares with one actor needs at least {size(one.needed_bytes)}: "
        f"{parts_text(one)}; one of the learner's own, {size(alone.needed_bytes)}"
    ]


def with_shared_memory(config: Config, rank: Rank) -> Config:
    """The configuration of this actor rank, with vLLM's part of GPUs that it shares, unless the
    user has set it.

    Also sets the KV cache: vLLM would otherwise measure the memory that is free while the learner
    allocates its own. Raises ConfigError if a GPU is too small, ModelError for an unusable model.
    """
    vllm = config.actors.vllm
    gpu_bytes = gpu_memory_bytes() if config.actors.engine == "vllm" else ()
    if not gpu_bytes:
        return config
    folder = model_folder(config.model.path)
    weights, errors = read_weights(folder)
    if weights is None:
        raise errors[0]
    budgets = shared_gpu_budgets(
        config, read_model_info(folder), weights, gpu_bytes=gpu_bytes, rank=rank
    )
    own = {gpu: budgets[gpu] for gpu in actor_gpus(config, rank, len(gpu_bytes)) if gpu in budgets}
    for gpu, budget in own.items():
        if (fault := budget_fault(config, gpu, budget)) is not None:
            raise fault
    if not own or vllm.gpu_memory_utilization is not None:
        return config
    smallest = min(own.values(), key=lambda budget: budget.engine_share)
    share = {
        "gpu_memory_utilization": smallest.engine_share,
        "kv_cache_bytes": vllm.kv_cache_bytes or smallest.kv_cache_bytes,
    }
    actors = config.actors.model_copy(update={"vllm": vllm.model_copy(update=share)})
    return config.model_copy(update={"actors": actors})


def budget_fault(config: Config, gpu: int, budget: MemoryBudget) -> ConfigError | None:
    """Why the users of this GPU do not fit, with all figures; None if they fit."""
    wanted = config.actors.vllm.gpu_memory_utilization
    total = budget.total_bytes
    if not budget.num_engines:
        return None if budget.fits else _learner_fault(config, gpu, budget)
    if config.actors.engine == "vllm" and wanted is not None and budget.fits:
        if wanted <= budget.engine_share:
            return None
        return ConfigError(
            "actors.vllm.gpu_memory_utilization",
            wanted,
            f"leaves too little of GPU {gpu} ({size(total)}) to its other users "
            f"({parts_text(budget)}); set at most {budget.engine_share}, or remove it",
        )
    if budget.fits:
        return None
    what = f"GPU {gpu} is shared by {_users(budget)}, which need {size(budget.needed_bytes)} of "
    what += f"{size(total)}: {parts_text(budget)}"
    kv_cache_bytes = config.actors.vllm.kv_cache_bytes
    if config.actors.engine == "vllm" and kv_cache_bytes == budget.engine[KV_CACHE]:
        return ConfigError(
            "actors.vllm.kv_cache_bytes",
            kv_cache_bytes,
            f"{what}; set less, or remove it: each engine then gets what the others leave",
        )
    return ConfigError(
        "model.path",
        config.model.path,
        f"{what}; use more GPUs or a larger one, a smaller model, or reduce model.context_length, "
        "actors.max_new_tokens or learner.micro_batch_tokens",
    )


def _learner_fault(config: Config, gpu: int, budget: MemoryBudget) -> ConfigError:
    return ConfigError(
        "model.path",
        config.model.path,
        f"a learner on GPU {gpu} needs {size(budget.needed_bytes)} of "
        f"{size(budget.total_bytes)}: {parts_text(budget)}; divide the model over several learners "
        "(cluster.learners, learner.cpu_offload), train adapters (learner.lora_rank), use a larger "
        "GPU or a smaller model, or reduce model.context_length, actors.max_new_tokens or "
        "learner.micro_batch_tokens",
    )


def describe(config: Config, gpu: int, budget: MemoryBudget) -> str:
    if not budget.num_engines:
        return (
            f"GPU {gpu} ({size(budget.total_bytes)}) is a learner's own, which needs "
            f"{size(budget.needed_bytes)}: {parts_text(budget)}"
        )
    text = (
        f"GPU {gpu} ({size(budget.total_bytes)}) is shared by {_users(budget)}, which need "
        f"{size(budget.needed_bytes)}: {parts_text(budget)}"
    )
    if not budget.fits or config.actors.engine != "vllm":
        return text
    wanted = config.actors.vllm.gpu_memory_utilization
    if wanted is not None:
        return f"{text}; actors.vllm.gpu_memory_utilization is set to {wanted}"
    kv_cache_bytes = config.actors.vllm.kv_cache_bytes or budget.kv_cache_bytes
    return (
        f"{text}; each engine uses {budget.engine_share:.1%} ({size(kv_cache_bytes)} of KV cache)"
    )


def parts_text(budget: MemoryBudget) -> str:
    parts = []
    if budget.learner:
        parts.append(f"learner {_listed(budget.learner)}")
    if budget.num_engines:
        each = "each engine" if budget.num_engines > 1 else "engine"
        parts.append(f"{each} {_listed(budget.engine)}")
    return "; ".join(parts)


def model_sizes(facts: ModelInfo, num_parameters: int) -> ModelSizes | None:
    """None if config.json leaves one of the sizes to the model class."""
    layers, hidden, vocabulary = facts.num_layers, facts.hidden_size, facts.vocab_size
    kv_heads, head_dim = facts.num_kv_heads, facts.head_dim
    if not (layers and hidden and vocabulary and kv_heads and head_dim):
        return None
    record = facts.record
    experts = record.get("moe_intermediate_size")
    if isinstance(experts, int):
        intermediate = experts * int(record.get("num_experts_per_tok") or 1)
    else:
        intermediate = int(record.get("intermediate_size") or 4 * hidden)
    return ModelSizes(
        num_parameters=num_parameters,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=int(record.get("num_attention_heads") or kv_heads),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        ties_embeddings=record.get("tie_word_embeddings") is True,
    )


def frozen_value_bytes(config: Config, facts: ModelInfo, weights: Weights) -> int:
    """Of a weight that a learner on a GPU does not train (`keeps_bfloat16` in the learner). With
    layers that need the GPU for the first check, the model is there in float32 at the start."""
    keeps = weights.dtype == "BF16" and not config.actors.computes_in_float32
    keeps = keeps and has_only_attention(facts.record)
    return COMPUTE_BYTES if keeps else MASTER_BYTES


def workload(
    config: Config, facts: ModelInfo, weights: Weights, *, num_local_ranks: int
) -> Workload:
    """`num_local_ranks`: processes per node, over whose learners the model is divided."""
    actors = config.actors
    longest = actors.max_new_tokens + (config.task.max_prompt_tokens or ASSUMED_PROMPT_TOKENS)
    context = config.model.context_length or facts.context_length or longest
    longest = min(longest, context)
    stored = DTYPE_BYTES.get(facts.dtype or "", 4)
    in_float32 = weights.dtype not in HALF or actors.computes_in_float32
    is_vllm = actors.engine == "vllm"
    layout = cache_layout(actors.num_slots, in_blocks=False)
    return Workload(
        longest_row=longest,
        micro_batch_tokens=config.learner.micro_batch_tokens,
        num_kv_tokens=context if is_vllm else layout.num_positions(longest),
        kv_cache_bytes=(actors.vllm.kv_cache_bytes or 0) if is_vllm else 0,
        engine_value_bytes=min(stored, 2) if is_vllm else stored,
        engine_shards=actors.weight_ranks,
        bucket_bytes=config.weights.bucket_bytes,
        has_reference=config.objective.kl_coefficient > 0,
        lora_rank=config.learner.lora_rank,
        frozen_value_bytes=frozen_value_bytes(config, facts, weights),
        learner_shards=num_shards(config.cluster.learners, ranks_per_node=num_local_ranks),
        gathered_value_bytes=MASTER_BYTES if in_float32 else COMPUTE_BYTES,
        cpu_offload=config.learner.cpu_offload,
        trains=config.run.updates > 0,
        has_entropy_gradient=config.objective.entropy_coefficient > 0,
        checkpointing=config.learner.activation_checkpointing,
    )


def _users(budget: MemoryBudget) -> str:
    engines = f"{budget.num_engines} actor{'s' if budget.num_engines > 1 else ''}"
    return f"a learner and {engines}" if budget.learner else engines


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in parts.items())
