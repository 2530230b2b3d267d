"""`[actors]` and `[actors.vllm]`: engines, sampling and verifiers."""

from typing import Annotated, Literal

from pydantic import Field

from speed_async.config.sections.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class VllmConfig(Section):
    """Options of `actors.engine = "vllm"`."""

    tensor_parallel: PositiveInt = 1
    """GPUs per actor for tensor parallelism."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the GPU memory that vLLM uses. None: 0.9; of a GPU that the learner or several
    actors use, the share that the memory budget of `speed-async check` leaves to each actor."""
    kv_cache_bytes: PositiveInt | None = None
    """Size of the KV cache per GPU, or per worker on a CPU. None: on a GPU the remainder of its
    share, on a CPU the size of at most 64 full sequences."""
    enforce_eager: bool = False
    """Disable compilation and CUDA graphs: faster start, slower decoding."""
    arguments: dict[str, object] = Field(default_factory=dict)
    """Additional arguments of `AsyncEngineArgs` of vLLM."""

    @property
    def memory_share(self) -> float:
        return self.gpu_memory_utilization or 0.9


DEFAULT_SLOTS = 64


class ActorsConfig(Section):
    engine: Literal["torch", "vllm", "scripted"] = "torch"
    """`torch` is built in and has no other dependencies. If this field is not set, a machine with a
    CUDA GPU and vLLM uses `vllm` (unless `actors.device` is `cpu`). `scripted` is for tests and
    fault injection: it samples random tokens without a model."""
    vllm: VllmConfig = VllmConfig()
    slots: PositiveInt | None = None
    """Sequences that one actor decodes concurrently. None: 64; `vllm`: 256, of which as many run as
    its KV cache holds."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. The learner's log-probabilities have it too."""
    max_new_tokens: PositiveInt = 64
    """Longest completion, in tokens. A longer one is truncated."""
    running_at_update: Literal["keep", "recompute"] = "keep"
    """Handling of running sequences when weights change. `keep`: they continue with their KV cache.
    `recompute`: the KV cache is recomputed with the new weights. In both cases mu is recorded as
    sampled, so importance ratios are exact."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: PositiveInt = 1
    """Torch threads of one actor on a CPU."""
    verifier_workers: PositiveInt = 1
    """Processes that score the completions of one actor."""
    verifier_timeout_s: PositiveFloat = 10.0
    """Longest time to score one completion. Beyond it, the group has failed."""
    max_restarts: NonNegativeInt = 3
    """Maximum restarts of one actor after it was killed by a signal."""

    @property
    def num_slots(self) -> int:
        return self.slots or (256 if self.engine == "vllm" else DEFAULT_SLOTS)

    @property
    def computes_in_float32(self) -> bool:
        """Whether the engines do, whatever the dtype of the model folder."""
        if self.engine == "vllm":
            return self.vllm.arguments.get("dtype") in ("float32", "float")
        return self.device == "cpu"

    @property
    def weight_ranks(self) -> int:
        """Weight group ranks per actor: one for each shard of its model."""
        return self.vllm.tensor_parallel if self.engine == "vllm" else 1
