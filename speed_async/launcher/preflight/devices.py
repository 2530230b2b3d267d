"""Detects whether torch will find a GPU, without importing torch."""

import os
from pathlib import Path

from speed_async.config.cuda import num_cuda_gpus, torch_build
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, NotAvailableHere
from speed_async.launcher.preflight.findings import Findings

ROCM_DEVICE = Path("/dev/kfd")
REMEDY = "use 'auto' or 'cpu'"


def check_devices(
    config: Config, findings: Findings, *, actors_here: bool = True, num_learners: int = 1
) -> None:
    """Report an error for `cuda` without a usable GPU, and for too few GPUs. Does not raise.

    `num_learners`: learner ranks of this node.
    """
    fields = [("learner.device", config.learner.device)]
    if actors_here and config.actors.engine != "vllm":  # vLLM detects its device itself
        fields.append(("actors.device", config.actors.device))
    on_cuda = [field for field, device in fields if device == "cuda"]
    if on_cuda and (fault := why_no_gpu()):
        findings.errors += [NotAvailableHere(field, "cuda", fault) for field in on_cuda]
    if config.weights.backend == "nccl":
        _check_nccl(config, findings, actors_here=actors_here)
    visible = num_cuda_gpus()
    if config.learner.device != "cpu" and 0 < visible < num_learners and not why_no_gpu():
        findings.errors.append(
            NotAvailableHere(
                "cluster.learners",
                config.cluster.learners,
                f"each learner rank needs a GPU of its own, and this node has {num_learners} of "
                f"them and {visible} visible GPUs; set at most {visible}, or start fewer processes "
                "on each of more nodes (--nproc-per-node)",
            )
        )
    split = config.actors.vllm.tensor_parallel
    if not (actors_here and config.actors.engine == "vllm" and split > 1):
        return
    if 0 < visible < split:
        findings.errors.append(
            NotAvailableHere(
                "actors.vllm.tensor_parallel",
                split,
                f"exceeds the number of visible GPUs ({visible}); set at most {visible}",
            )
        )


def _check_nccl(config: Config, findings: Findings, *, actors_here: bool) -> None:
    """Report an error if NCCL cannot be used. It requires one GPU per rank."""
    kind, fault = NotAvailableHere, ""
    ranks, visible = config.cluster.learners + config.cluster.actors, num_cuda_gpus()
    if config.learner.device == "cpu":
        kind, fault = ConfigError, "NCCL transfers weights between GPUs, and learner.device = 'cpu'"
    elif why_no_gpu():
        fault = "NCCL transfers weights between GPUs, and no GPU is usable here"
    elif actors_here and 0 < visible < ranks:
        fault = f"NCCL requires one GPU for each of {ranks} ranks, and {visible} are visible"
    if fault:
        findings.errors.append(kind("weights.backend", "nccl", f"{fault}; use 'auto'"))


def why_no_gpu() -> str:
    """Why torch has no usable GPU; empty if it has one."""
    build = torch_build()
    if build == "cpu":
        return f"the installed torch is a CPU-only build; install a CUDA build, or {REMEDY}"
    if build == "hip":
        found = ROCM_DEVICE.exists()
        return "" if found else f"no ROCm device was found ({ROCM_DEVICE}); {REMEDY}"
    if num_cuda_gpus() > 0:
        return ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = f" (CUDA_VISIBLE_DEVICES = {hidden!r})" if hidden is not None else ""
    return f"no CUDA device is visible{why}; {REMEDY}"
