"""Detects whether torch will find a GPU, without importing torch."""

import ctypes
import importlib.util
import os
import re
from functools import cache
from pathlib import Path

from speed_async.config.schema import Config
from speed_async.errors import ConfigError, NotAvailableHere
from speed_async.launcher.preflight.findings import Findings

DRIVER = "libcuda.so.1"
ROCM_DEVICE = Path("/dev/kfd")
REMEDY = "use 'auto' or 'cpu'"


def check_devices(config: Config, findings: Findings, *, actors_here: bool = True) -> None:
    """Report an error for `cuda` on a machine without a usable GPU. Does not raise."""
    fields = [("learner.device", config.learner.device)]
    if actors_here and config.actors.engine != "vllm":  # vLLM detects its device itself
        fields.append(("actors.device", config.actors.device))
    on_cuda = [field for field, device in fields if device == "cuda"]
    if on_cuda and (fault := why_no_gpu()):
        findings.errors += [NotAvailableHere(field, "cuda", fault) for field in on_cuda]
    if config.weights.backend == "nccl":
        _check_nccl(config, findings, actors_here=actors_here)
    split = config.actors.vllm.tensor_parallel
    if not (actors_here and config.actors.engine == "vllm" and split > 1):
        return
    visible = num_cuda_gpus()
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


@cache
def num_cuda_gpus() -> int:
    """Number of GPUs that the driver reports under CUDA_VISIBLE_DEVICES; 0 without a driver."""
    try:
        driver = ctypes.CDLL(DRIVER)
        count = ctypes.c_int(0)
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return 0
    except (OSError, AttributeError):
        return 0
    return count.value


def torch_build() -> str:
    """`cpu`, `cuda` or `hip`, read from torch/version.py."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "cpu"
    version = Path(found.origin).with_name("version.py")
    text = version.read_text() if version.is_file() else ""
    for build in ("hip", "cuda"):
        if re.search(rf"^{build}\b[^=\n]*=\s*['\"]", text, re.MULTILINE):
            return build
    return "cpu" if re.search(r"^cuda\b[^=\n]*=\s*None", text, re.MULTILINE) else "cuda"
