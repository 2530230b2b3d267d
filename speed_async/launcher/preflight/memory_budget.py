"""Memory of one GPU of a learner, of engines, or of both, by part.

learner, per parameter: 4 bytes each of float32 weights and gradients, 8 of AdamW's two moments, 2
of the bfloat16 weights of autocast, and 4 of a reference model if there is one. With adapters
(LoRA), only these have gradients and moments, the weights of a bfloat16 model take 2 bytes and need
no copies, and the reference model is the model without adapters. Several learners divide all of
this, and gather what they compute with; `cpu_offload` keeps the rest in host memory.
Activations and logits are those of the largest micro-batch (`activation_bytes`, `logits_bytes`).

engine: weights in its dtype, a KV cache of at least one sequence of the full context, or of
`actors.vllm.kv_cache_bytes`, and the working memory of its kernels.

Both: the context of each process (CUDA, torch, NCCL). Fragmentation is not included.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from speed_async.config.sections.learner import ActivationCheckpointing
from speed_async.learner.limits import MAX_LOGITS, resolved_checkpointing

GIB = 1 << 30
MASTER_BYTES = 4
"""A float32 weight; a gradient has the same size."""
MOMENTS_BYTES = 8
COMPUTE_BYTES = 2
PROCESS_BYTES = GIB
KERNEL_BYTES = GIB
"""Working memory of an engine beside its KV cache: activations of a prefill, CUDA graphs."""
KV_CACHE = "KV cache"
BYTES_PER_LOGIT = 16
"""In float32: logits, log-probabilities, probabilities and their product, for the entropies."""
BYTES_PER_LOGIT_WITH_ENTROPY_GRADIENT = 24
"""The backward pass of the entropies holds two more."""
USED_SHARE = 0.97
"""Of the memory: the rest is for fragmentation and for what the driver takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    num_parameters: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Of the experts that one token is routed to, together."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    ties_embeddings: bool = False
    """Embeddings and head are one table."""

    @property
    def kv_values_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    longest_row: int
    """Tokens of the longest prompt and completion."""
    micro_batch_tokens: int
    num_kv_tokens: int
    """Tokens for which an engine needs a KV cache at least."""
    kv_cache_bytes: int = 0
    """Size of the KV cache on each GPU of an engine, if it is set."""
    engine_value_bytes: int
    """Bytes of one number of the engine's weights and KV cache."""
    engine_shards: int = 1
    """GPUs that divide the weights and the KV cache of an engine."""
    bucket_bytes: int
    has_reference: bool = False
    lora_rank: int = 0
    """0 trains all weights."""
    frozen_value_bytes: int = MASTER_BYTES
    """Bytes of one frozen weight, with adapters."""
    learner_shards: int = 1
    """Learners that divide the parameters."""
    gathered_value_bytes: int = COMPUTE_BYTES
    """Bytes of one gathered weight, with several learners."""
    trains: bool = True
    """False for a run without updates, which only measures."""
    cpu_offload: bool = False
    """With several learners."""
    has_entropy_gradient: bool = False
    checkpointing: ActivationCheckpointing = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBudget:
    learner: Mapping[str, int]
    """Bytes by part; empty if no learner uses this GPU."""
    engine: Mapping[str, int]
    """The least that one engine needs, by part."""
    num_engines: int
    total_bytes: int

    @property
    def needed_bytes(self) -> int:
        return sum(self.learner.values()) + self.num_engines * sum(self.engine.values())

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.total_bytes

    @property
    def engine_bytes(self) -> int:
        """What each engine can use: an equal part of what the learner leaves."""
        left = int(USED_SHARE * self.total_bytes) - sum(self.learner.values())
        return max(left // self.num_engines, sum(self.engine.values()))

    @property
    def engine_share(self) -> float:
        """`engine_bytes` as a share of the memory, rounded down to thousandths."""
        return 1000 * self.engine_bytes // self.total_bytes / 1000

    @property
    def kv_cache_bytes(self) -> int:
        """The part of `engine_bytes` that is left for the KV cache."""
        others = sum(size for name, size in self.engine.items() if name != KV_CACHE)
        return self.engine_bytes - others


def memory_budget(
    sizes: ModelSizes, workload: Workload, *, has_learner: bool, num_engines: int, total_bytes: int
) -> MemoryBudget:
    """The budget of a GPU of `total_bytes`. `num_engines` is 0 only for a learner by itself."""
    value_bytes, shards = workload.engine_value_bytes, workload.engine_shards
    kv_bytes = value_bytes * sizes.kv_values_per_token * workload.num_kv_tokens
    engine = {
        "weights": value_bytes * sizes.num_parameters // shards,
        KV_CACHE: max(kv_bytes // shards, workload.kv_cache_bytes),
        "kernels": KERNEL_BYTES,
        "process": PROCESS_BYTES,
    }
    return MemoryBudget(
        learner=learner_bytes(sizes, workload) if has_learner else {},
        engine=engine,
        num_engines=num_engines,
        total_bytes=total_bytes,
    )


def learner_bytes(sizes: ModelSizes, workload: Workload) -> dict[str, int]:
    """Bytes of a learner on a GPU by part."""
    num, tokens = sizes.num_parameters, max(workload.longest_row, workload.micro_batch_tokens)
    trained = copied = num
    weights_bytes = MASTER_BYTES * num
    checkpointing = resolved_checkpointing(workload.checkpointing, num, on_gpu=True)
    if workload.lora_rank:
        trained = adapter_parameters(sizes, workload.lora_rank)
        weights_bytes = workload.frozen_value_bytes * num + MASTER_BYTES * trained
        # Autocast keeps the copies of trained weights only. Others live until the backward pass of
        # their layer, whose forward pass may be repeated just before.
        if workload.frozen_value_bytes == COMPUTE_BYTES:
            copied = 0
        elif checkpointing != "none":
            copied = num // sizes.num_layers
        copied += trained
    if not workload.trains:
        trained = 0
    has_model = workload.has_reference and not workload.lora_rank
    # A tensor larger than a bucket has its own; its digest is of a copy in the engines' precision.
    largest = workload.engine_value_bytes * sizes.vocab_size * sizes.hidden_size
    shards = workload.learner_shards
    kept = 0 if workload.cpu_offload and shards > 1 else 1
    parts = {
        "weights": kept * weights_bytes // shards,
        "gradients": kept * MASTER_BYTES * trained // shards,
        "optimizer": kept * MOMENTS_BYTES * trained // shards,
        "bfloat16 weights": COMPUTE_BYTES * copied if shards == 1 else 0,
        "gathered weights": _gathered_bytes(sizes, workload) if shards > 1 else 0,
        "reference model": kept * MASTER_BYTES * num * has_model // shards,
        "activations": activation_bytes(sizes, tokens, checkpointing=checkpointing),
        "logits": logits_bytes(sizes, tokens, entropy_gradient=workload.has_entropy_gradient),
        "weight transfer": 2 * max(workload.bucket_bytes, largest) + largest,
        "process": PROCESS_BYTES,
    }
    return {name: size for name, size in parts.items() if size}


def _gathered_bytes(sizes: ModelSizes, workload: Workload) -> int:
    """Of sharded parameters, what a learner has whole: two layers (one is gathered while another
    computes), embeddings and head, and the largest of these once more as a gradient, as computed
    and in float32 for the sum over the ranks."""
    tables = (2 - sizes.ties_embeddings) * sizes.vocab_size * sizes.hidden_size
    layer = (sizes.num_parameters - tables) // sizes.num_layers
    each = workload.gathered_value_bytes
    has_gradient = workload.trains and not workload.lora_rank
    gradient = (each + MASTER_BYTES) * max(layer, tables) if has_gradient else 0
    return each * (2 * layer + tables) + gradient


def adapter_parameters(sizes: ModelSizes, rank: int) -> int:
    """Parameters of the adapters (LoRA) of a Llama: `rank` x (inputs + outputs) of each linear
    layer. Too many for experts that are one tensor, which have none."""
    hidden, queries = sizes.hidden_size, sizes.num_heads * sizes.head_dim
    keys = sizes.num_kv_heads * sizes.head_dim
    attention = 2 * (hidden + queries) + 2 * (hidden + keys)
    return rank * sizes.num_layers * (attention + 3 * (hidden + sizes.intermediate_size))


def activation_bytes(
    sizes: ModelSizes,
    num_tokens: int,
    *,
    checkpointing: ActivationCheckpointing = "auto",
    autocast: bool = True,
) -> int:
    """Bytes that the backward pass of `num_tokens` tokens needs, without head and logits.

    With recomputation, all of one layer, and for each layer its input and, if `selective`, the
    results of its matrix products and of attention.
    """
    layer = layer_activation_bytes(sizes, autocast=autocast)
    kind = resolved_checkpointing(checkpointing, sizes.num_parameters, on_gpu=autocast)
    if kind == "none":
        return num_tokens * sizes.num_layers * layer
    kept = MASTER_BYTES * sizes.hidden_size
    if kind == "selective":
        kept += (COMPUTE_BYTES if autocast else MASTER_BYTES) * _num_results(sizes)
    return num_tokens * (layer + sizes.num_layers * kept)


def _num_results(sizes: ModelSizes) -> int:
    """Numbers per token in the results of the matrix products and of attention of one layer."""
    queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    return 2 * queries + 2 * keys + 2 * sizes.hidden_size + 2 * sizes.intermediate_size


def layer_activation_bytes(sizes: ModelSizes, *, autocast: bool) -> int:
    """Bytes per token that the backward pass of one layer of a Llama needs.

    Two norms in float32 keep their input and their normalised values. The projections of attention
    keep their input, and rotary embeddings and attention queries, keys, values and the result. The
    gated MLP keeps its input and four results. `autocast`: in bfloat16, with a copy of the input
    for each projection that reads it.
    """
    hidden, queries = sizes.hidden_size, sizes.num_heads * sizes.head_dim
    keys = sizes.num_kv_heads * sizes.head_dim
    norms = 2 * 2 * MASTER_BYTES * hidden
    values = 2 * queries + 3 * keys + queries + 4 * sizes.intermediate_size
    if not autocast:
        return norms + MASTER_BYTES * (2 * hidden + values)
    copies = 3 * hidden + 2 * hidden
    return norms + COMPUTE_BYTES * (copies + values)


def logits_bytes(sizes: ModelSizes, num_tokens: int, *, entropy_gradient: bool = False) -> int:
    """The largest sum of tensors with one number per logit, in the forward and backward pass."""
    each = BYTES_PER_LOGIT_WITH_ENTROPY_GRADIENT if entropy_gradient else BYTES_PER_LOGIT
    return each * min(num_tokens * sizes.vocab_size, MAX_LOGITS)
