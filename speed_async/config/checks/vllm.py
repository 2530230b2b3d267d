"""Values that vLLM would handle differently from the learner or from the launcher."""

from collections.abc import Iterator

from speed_async.config.schema import Config
from speed_async.errors import ConfigError

MIN_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this value, except 0 (greedy)."""
OTHER_PARALLELISM = ("pipeline_parallel", "data_parallel", "prefill_context_parallel")


def is_raised(temperature: float) -> bool:
    """Whether vLLM samples at MIN_TEMPERATURE instead."""
    return 0 < temperature < MIN_TEMPERATURE


def check_vllm(config: Config) -> Iterator[ConfigError]:
    if config.actors.engine != "vllm":
        return
    for name in config.actors.vllm.arguments:
        if name.startswith(OTHER_PARALLELISM):
            yield ConfigError(
                "actors.vllm.arguments",
                name,
                "the launcher assigns GPUs and weight ranks to actors, and supports tensor "
                "parallelism only; remove it, and set actors.vllm.tensor_parallel, or start more "
                "actors (cluster.actors)",
            )
    temperatures = [("actors.temperature", config.actors.temperature)]
    temperatures += [("evaluate.suites", each.temperature) for each in config.evaluate.suites]
    for field, temperature in temperatures:
        if is_raised(temperature):
            yield ConfigError(
                field,
                temperature,
                f"vLLM samples at {MIN_TEMPERATURE} instead, and the log-probabilities of the "
                f"learner would not match; set at least {MIN_TEMPERATURE}, or actors.engine = "
                "'torch'",
            )
