"""Start-up options of vLLM, as plain values: this module does not import vLLM."""

import os
from types import SimpleNamespace
from typing import Any

from speed_async.actors.model_folder import (
    check_model_folder,
    eos_token_ids,
    load_tokenizer,
    usable_context,
)
from speed_async.config.local_model import model_folder
from speed_async.config.schema import Config
from speed_async.config.sections.actors import DEFAULT_SLOTS
from speed_async.errors import ConfigError

TRANSFER_BACKEND = "speed_async"
"""Name under which actors/vllm_engine/worker.py registers the receiver in vLLM's workers."""
WORKER_EXTENSION = "speed_async.actors.vllm_engine.worker.WorkerExtension"
SPARE_BLOCKS = 8
"""Extra KV cache blocks for the canary and for requests that have finished but not yet freed their
blocks, so that no running request is preempted."""


class ServingInfo:
    """Limits on requests, read from the model folder without its weights."""

    def __init__(self, config: Config) -> None:
        """Raises ModelError when the folder is unusable."""
        from transformers import AutoConfig, GenerationConfig

        folder = model_folder(config.model.path)
        check_model_folder(folder)
        self.hf_config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        try:
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except OSError:  # optional
            generation = None
        configs = SimpleNamespace(config=self.hf_config, generation_config=generation)
        self.eos_token_ids = eos_token_ids(
            configs, load_tokenizer(folder), config.model.stop_tokens
        )
        self.context_length = usable_context(folder, self.hf_config, config.model.context_length)


def engine_arguments(
    config: Config, info: ServingInfo, *, seed: int, on_cpu: bool
) -> dict[str, Any]:
    """Arguments of `AsyncEngineArgs`, except `weight_transfer_config`, which is a vLLM object.

    Raises ConfigError when `actors.vllm.arguments` has an argument that another field sets.
    """
    actors = config.actors
    arguments: dict[str, Any] = {
        "model": str(model_folder(config.model.path)),
        "skip_tokenizer_init": True,  # tokens in, tokens out
        "generation_config": "vllm",
        "max_model_len": info.context_length,
        "max_num_seqs": actors.num_slots,
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
        arguments["kv_cache_memory_bytes"] = actors.vllm.kv_cache_bytes or _full_kv_bytes(
            info, min(actors.num_slots, DEFAULT_SLOTS), actors.vllm.tensor_parallel
        )
    else:
        arguments["gpu_memory_utilization"] = actors.vllm.memory_share
        if actors.vllm.kv_cache_bytes is not None:
            arguments["kv_cache_memory_bytes"] = actors.vllm.kv_cache_bytes
    for name in actors.vllm.arguments:
        if name in arguments or name == "weight_transfer_config":
            raise ConfigError(
                "actors.vllm.arguments",
                name,
                "this vLLM argument is derived from another field; set that field instead",
            )
    return arguments | actors.vllm.arguments


def _full_kv_bytes(info: ServingInfo, slots: int, tensor_parallel: int) -> int:
    """Bytes of one worker's float32 KV cache with space for a full sequence in every slot.

    By default, vLLM allocates most of a CPU machine's memory.
    """
    text = info.hf_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    block = 128  # tokens; vLLM's default on a CPU
    num_blocks = slots * -(-info.context_length // block) + SPARE_BLOCKS
    heads_per_worker = max(1, heads // tensor_parallel)
    return 2 * 4 * text.num_hidden_layers * heads_per_worker * head_dim * block * num_blocks
