# pyright: reportMissingImports=false
"""Starts an AsyncLLM of vLLM from the configuration."""

from functools import partial

from vllm.config import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from speed_async.actors.stepped_engine.admission import ModelLimits
from speed_async.actors.vllm_engine.engine import StartedLlm, VllmEngine
from speed_async.actors.vllm_engine.options import TRANSFER_BACKEND, ServingInfo, engine_arguments
from speed_async.config.schema import Config
from speed_async.errors import SpeedAsyncError
from speed_async.observability.first_error import LogSince, is_secondary_error, one_line

SHUTDOWN_S = 5.0


def make_vllm_engine(config: Config, *, seed: int) -> VllmEngine:
    """An engine that is not started yet. The parent process sets `options.ENVIRONMENT`."""
    return VllmEngine(
        partial(start_llm, config, seed=seed),
        recompute_at_update=config.actors.running_at_update == "recompute",
        canary_tolerance_nats=config.weights.canary_tolerance,
    )


def start_llm(config: Config, *, seed: int) -> StartedLlm:
    """Start vLLM and wait until it is ready. Raises ModelError, ConfigError or SpeedAsyncError."""
    info = ServingInfo(config)
    arguments = engine_arguments(config, info, seed=seed, on_cpu=current_platform.is_cpu())
    log = LogSince()
    try:
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                **arguments, weight_transfer_config=WeightTransferConfig(backend=TRANSFER_BACKEND)
            )
        )
    except (RuntimeError, ValueError, TypeError, OSError) as error:  # errors of vLLM's start
        text = one_line(f"{type(error).__name__}: {error}")
        cause = log.first_error() if is_secondary_error(text) else ""
        raise SpeedAsyncError(
            f"vLLM did not start: {cause or text} (see the actor's log)"
        ) from error
    return StartedLlm(
        llm=llm,
        limits=ModelLimits(
            context_length=info.context_length,
            num_token_ids=info.hf_config.get_text_config().vocab_size,
        ),
        eos_token_ids=info.eos_token_ids,
        num_slots=config.actors.num_slots,
        dtype=str(llm.model_config.dtype),
        close=partial(llm.shutdown, timeout=SHUTDOWN_S),
    )
