"""What torch will find of CUDA, without importing torch, and the engine that follows from it."""

import ctypes
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Literal

DRIVER = "libcuda.so.1"


def default_engine(device: object) -> Literal["torch", "vllm"]:
    """`actors.engine` if it is not set: vLLM where it is installed and a CUDA GPU is visible.

    `device`: `actors.device`.
    """
    if device == "cpu" or importlib.util.find_spec("vllm") is None or torch_build() != "cuda":
        return "torch"
    return "vllm" if num_cuda_gpus() else "torch"


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


def driver_version() -> str | None:
    """The newest CUDA version that the driver supports, such as 13.0; None without a driver."""
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def gpu_memory_bytes() -> tuple[int, ...]:
    """Total memory of each GPU that `num_cuda_gpus` counts; empty if the driver does not tell."""
    sizes = []
    for index in range(num_cuda_gpus()):
        driver, device, size = ctypes.CDLL(DRIVER), ctypes.c_int(), ctypes.c_size_t()
        if driver.cuDeviceGet(ctypes.byref(device), index):
            return ()
        if driver.cuDeviceTotalMem_v2(ctypes.byref(size), device):
            return ()
        sizes.append(size.value)
    return tuple(sizes)


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
