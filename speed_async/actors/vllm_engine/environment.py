"""Environment of the process that starts vLLM.

It must be set before that process imports torch, so the parent sets it. This module imports neither
vLLM nor torch: the parent would delay its child by seconds.
"""

from speed_async.config.schema import Config

ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # the actor already has threads
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # the actor's log file
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
CPU_ENVIRONMENT = {
    # With binding, threads of several actors share the same cores. Spinning threads starve the
    # engine's scheduler, the learner and each other (docs/benchmarks.md).
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}


def process_environment(config: Config, *, on_cpu: bool) -> dict[str, str]:
    """Environment variables of an actor process with a vLLM engine."""
    ready = {"VLLM_ENGINE_READY_TIMEOUT_S": str(int(config.cluster.stall_timeout_s))}
    if not on_cpu:
        return ENVIRONMENT | ready
    threads = {"OMP_NUM_THREADS": str(config.actors.num_threads)}
    return ENVIRONMENT | ready | CPU_ENVIRONMENT | threads
