"""What vLLM is started with. Plain values: nothing of vLLM is imported here.

`ENVIRONMENT` has to be there before the process that starts vLLM loads torch, so whoever starts
that process sets it.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from speed_async.actors.model_folder import (
    check_model_folder,
    eos_token_ids,
    load_tokenizer,
    usable_context,
)
from speed_async.config.schema import Config
from speed_async.errors import ConfigError

TRANSFER_BACKEND = "speed_async"
"""Under this name actors/vllm_engine/worker.py registers the receiver inside vLLM's workers."""
WORKER_EXTENSION = "speed_async.actors.vllm_engine.worker.WorkerExtension"
ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # the actor has threads by then
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # the actor's log
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
CPU_ENVIRONMENT = {
    # Bound threads of several actors would sit on the same cores, and spinning ones starve the
    # engine's scheduler, the learner and each other (docs/benchmarks.md).
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}
SPARE_BLOCKS = 8
"""Of the KV cache: the canary, and what a request that just ended has not given back, must not
push a running one out."""


def process_environment(config: Config, *, on_cpu: bool) -> dict[str, str]:
    """Environment of an actor whose engine is vLLM."""
    ready = {"VLLM_ENGINE_READY_TIMEOUT_S": str(int(config.cluster.stall_timeout_s))}
    if not on_cpu:
        return ENVIRONMENT | ready
    threads = {"OMP_NUM_THREADS": str(config.actors.num_threads)}
    return ENVIRONMENT | ready | CPU_ENVIRONMENT | threads


class ServingInfo:
    """What requests have to respect, read from the model folder without its weights."""

    def __init__(self, config: Config) -> None:
        """Raises ModelError when the folder cannot serve."""
        from transformers import AutoConfig, GenerationConfig

        folder = Path(config.model.path)
        check_model_folder(folder)
        self.hf_config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        try:
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except OSError:  # optional
            generation = None
        holder = SimpleNamespace(config=self.hf_config, generation_config=generation)
        self.eos_token_ids = eos_token_ids(holder, load_tokenizer(folder))
        self.context_length = usable_context(folder, self.hf_config, config.model.context_length)


def engine_arguments(
    config: Config, facts: ServingInfo, *, seed: int, on_cpu: bool
) -> dict[str, Any]:
    """Arguments of `AsyncEngineArgs`, but for the weight transfer's, which is an object of vLLM's.

    Raises ConfigError when `actors.vllm.arguments` names one that is set by another field.
    """
    actors = config.actors
    arguments: dict[str, Any] = {
        "model": config.model.path,
        "skip_tokenizer_init": True,  # token in, token out
        "generation_config": "vllm",
        "max_model_len": facts.context_length,
        "max_num_seqs": actors.slots,
        "tensor_parallel_size": actors.vllm.tensor_parallel,
        "enforce_eager": actors.vllm.enforce_eager,
        "seed": seed,
        "scheduling_policy": "priority",
        "logprobs_mode": "processed_logprobs",  # mu as sampled
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "worker_extension_cls": WORKER_EXTENSION,
        "additional_config": {"actor_process_id": os.getpid()},
    }
    if on_cpu:
        arguments["dtype"] = "float32"
        arguments["kv_cache_memory_bytes"] = actors.vllm.kv_cache_bytes or _whole_kv_bytes(
            facts, actors.slots, actors.vllm.tensor_parallel
        )
    else:
        arguments["gpu_memory_utilization"] = actors.vllm.gpu_memory_utilization
        if actors.vllm.kv_cache_bytes is not None:
            arguments["kv_cache_memory_bytes"] = actors.vllm.kv_cache_bytes
    for name in actors.vllm.arguments:
        if name in arguments or name == "weight_transfer_config":
            raise ConfigError(
                "actors.vllm.arguments",
                name,
                "this argument of vLLM follows from another field; set that one",
            )
    return arguments | actors.vllm.arguments


def _whole_kv_bytes(facts: ServingInfo, slots: int, tensor_parallel: int) -> int:
    """KV cache of one worker in which every slot can hold a whole sequence, in float32.

    vLLM would take most of a CPU machine's memory instead.
    """
    text = facts.hf_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    block = 128  # tokens; vLLM's default on a CPU
    num_blocks = slots * -(-facts.context_length // block) + SPARE_BLOCKS
    heads_here = max(1, heads // tensor_parallel)
    return 2 * 4 * text.num_hidden_layers * heads_here * head_dim * block * num_blocks
