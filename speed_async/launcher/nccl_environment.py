"""Environment of processes that use NCCL. torch reads it when the first group is made.

torchrun sets some of these variables; the values here take precedence.
"""

from math import ceil


def nccl_environment(deadline_s: float) -> dict[str, str]:
    """Keeps torch from ending a process because a peer has died: the weight group has deadlines of
    its own, and continues without the peer."""
    return {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # torchrun: 1, the watchdog ends the process
        "TORCH_NCCL_ENABLE_MONITORING": "0",  # else the process ends when an abort takes long
        # A communicator that is being created can only be aborted after this.
        "TORCH_NCCL_NONBLOCKING_TIMEOUT": str(ceil(deadline_s)),
    }
