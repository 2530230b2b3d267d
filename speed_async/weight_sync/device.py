"""The device of a process, always with an index. Learner and actors resolve it here."""

import os
from typing import Literal

import torch

from speed_async.errors import ConfigError

DeviceChoice = Literal["auto", "cpu", "cuda"]


def resolve_device(field: str, choice: DeviceChoice) -> torch.device:
    """The CPU, or one of the visible GPUs, numbered by LOCAL_RANK.

    A supervisor hides all GPUs except its actor's own, so LOCAL_RANK may exceed their number and is
    taken modulo it. The current device of CUDA is not used: it belongs to a thread, and weights are
    transferred in other threads. NCCL requires the index.
    Raises ConfigError naming `field` for "cuda" on a machine without a visible GPU.
    """
    num_visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if choice == "cuda" and not num_visible:
        raise ConfigError(field, choice, "no CUDA device is visible; use 'auto' or 'cpu'")
    if choice == "cpu" or not num_visible:
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local_rank % num_visible)


def gpu_uuid(device: torch.device) -> str:
    """The same in every process, whatever GPUs are visible to it."""
    return str(torch.cuda.get_device_properties(device).uuid)
