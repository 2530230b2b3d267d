"""Environment of an actor's process, set by its supervisor. Imports neither torch nor the engine:
their import takes seconds, and the supervisor would delay its actor by it."""

from speed_async.actors.vllm_engine.environment import process_environment
from speed_async.config.cuda import num_cuda_gpus, torch_build
from speed_async.config.schema import Config
from speed_async.launcher.nccl_environment import nccl_environment


def engine_environment(config: Config) -> dict[str, str]:
    """Additional environment of an actor's process; must be set before torch is loaded."""
    nccl = nccl_environment(config.weights.deadline_s)
    if config.actors.engine != "vllm":
        return nccl
    return nccl | process_environment(config, on_cpu=num_gpus() == 0)


def num_gpus() -> int:
    """Number of GPUs that torch can use in this process."""
    build = torch_build()
    if build == "hip":
        import torch

        return torch.cuda.device_count()
    return num_cuda_gpus() if build == "cuda" else 0
