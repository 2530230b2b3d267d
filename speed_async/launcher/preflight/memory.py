"""An estimate of memory: what weights, gradients, optimiser and KV cache take, and what not.

learner    16 bytes a parameter: float32 weights, gradients and two moments of AdamW
actor      its weights (float32 on a CPU, the folder's own type on a GPU), and a KV cache of
           slots x context tokens x 2 x layers x KV heads x head size numbers
Activations, logits and the processes' own code (about 1 GiB each with torch) come on top.
"""

from pathlib import Path

from speed_async.config.schema import Config
from speed_async.launcher.preflight.devices import why_no_gpu
from speed_async.launcher.preflight.findings import Findings
from speed_async.launcher.preflight.machine import size
from speed_async.launcher.preflight.model import CheckedModel

LEARNER_BYTES = 16
CHECKPOINT_BYTES = 12
"""A parameter in float32, and the optimiser's two moments."""
FLOAT32_BYTES = 4
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


def estimate_memory(config: Config, model: CheckedModel, findings: Findings) -> list[str]:
    """Lines that tell; a warning where a machine without a GPU has less."""
    if model.weights is None:
        return []
    on_gpu = not why_no_gpu()
    learner_bytes = LEARNER_BYTES * model.weights.num_parameters
    value_bytes = FLOAT32_BYTES
    if on_gpu and config.actors.device != "cpu":
        value_bytes = DTYPE_BYTES.get(model.facts.dtype or "", FLOAT32_BYTES)
    weight_bytes = value_bytes * model.weights.num_parameters
    kv_bytes = _kv_bytes(config, model, value_bytes)
    lines = [
        f"model: {model.weights.num_parameters:,} parameters, {size(model.weights.num_bytes)} of "
        f"weights ({model.facts.dtype or 'type not said'})",
        f"learner: about {size(learner_bytes)} ({LEARNER_BYTES} bytes a parameter: weights, "
        "gradients, two moments)",
    ]
    cache = "a KV cache of unknown size"
    if config.actors.engine == "vllm" and on_gpu:
        share = config.actors.vllm.gpu_memory_utilization
        cache = f"vLLM takes {share:.0%} of its GPUs' memory in all"
    elif kv_bytes is not None:
        cache = (
            f"{size(kv_bytes)} of KV cache ({config.actors.slots} slots x {model.context_length} "
            "tokens) at most"
        )
    lines.append(f"each actor: {size(weight_bytes)} of weights, and {cache}")
    lines.append("an estimate: activations, logits and about 1 GiB a process come on top")
    if not on_gpu:
        actor_bytes = weight_bytes + (kv_bytes or 0)
        _compare(learner_bytes + config.cluster.actors * actor_bytes, findings)
    return lines


def _kv_bytes(config: Config, model: CheckedModel, value_bytes: int) -> int | None:
    if config.actors.vllm.kv_cache_bytes is not None and config.actors.engine == "vllm":
        return config.actors.vllm.kv_cache_bytes
    values = model.facts.kv_values_per_token
    if values is None or model.context_length is None:
        return None
    return value_bytes * values * config.actors.slots * model.context_length


def _compare(needed_bytes: int, findings: Findings) -> None:
    available = _available_bytes()
    if available is not None and needed_bytes > available:
        findings.warnings.append(
            f"the run may need more memory than is here: about {size(needed_bytes)} for weights, "
            f"optimiser and KV caches, and {size(available)} are free; fewer actors.slots, a "
            "smaller model.context_length or fewer cluster.actors take less"
        )


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None
