"""`[actors]` and `[actors.vllm]`: engines, sampling and verifiers."""

from typing import Annotated, Literal

from pydantic import Field

from speed_async.config.sections.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class VllmConfig(Section):
    """Options of `actors.engine = "vllm"`."""

    tensor_parallel: PositiveInt = 1
    """GPUs per actor for tensor parallelism."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the GPU memory that vLLM uses."""
    kv_cache_bytes: PositiveInt | None = None
    """Size of the KV cache per GPU, or per worker on a CPU. None: on a GPU the remainder of its
    share, on a CPU the size of `actors.slots` full sequences."""
    enforce_eager: bool = False
    """Disable compilation and CUDA graphs: faster start, slower decoding."""
    arguments: dict[str, object] = Field(default_factory=dict)
    """Additional arguments of `AsyncEngineArgs` of vLLM."""


class ActorsConfig(Section):
    engine: Literal["torch", "vllm", "scripted"] = "torch"
    """`torch` is built in and has no other dependencies; `vllm` is for clusters. `scripted` is for
    tests and fault injection: it samples random tokens without a model."""
    vllm: VllmConfig = VllmConfig()
    slots: PositiveInt = 64
    """Sequences that one actor decodes concurrently."""
    temperature: PositiveFloat = 1.0
    max_new_tokens: PositiveInt = 64
    running_at_update: Literal["keep", "recompute"] = "keep"
    """Handling of running sequences when weights change. `keep`: they continue with their KV cache.
    `recompute`: the KV cache is recomputed with the new weights. In both cases mu is recorded as
    sampled, so importance ratios are exact."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: PositiveInt = 1
    """Torch threads of one actor on a CPU."""
    verifier_workers: PositiveInt = 1
    verifier_timeout_s: PositiveFloat = 10.0
    max_restarts: NonNegativeInt = 3
    """Maximum restarts of one actor after it was killed by a signal."""

    @property
    def weight_ranks(self) -> int:
        """Weight group ranks per actor: one for each shard of its model."""
        return self.vllm.tensor_parallel if self.engine == "vllm" else 1
