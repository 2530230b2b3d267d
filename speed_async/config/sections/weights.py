"""`[weights]`: transfers of policy versions to the actors."""

from typing import Literal

from speed_async.config.sections.section import PositiveFloat, PositiveInt, Section


class WeightsConfig(Section):
    backend: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """Transfer backend. `gloo`: over the network, between host memories. `nccl`: between GPUs, one
    per rank. `ipc`: within one machine, through shared memory (GPU memory if learner and actors
    share the GPU). `auto` selects a backend by the devices of the ranks on the learner's node. If
    that is `nccl`, actors on other nodes and actors that join need GPUs of their own as well; set
    `gloo` if they have none."""
    bucket_bytes: PositiveInt = 64 * 1024 * 1024
    """Tensors are sent together up to this size. Sender and receiver have two such buffers."""
    deadline_s: PositiveFloat = 60.0
    """Maximum wait in each stage of a transfer."""
    canary_tolerance: PositiveFloat | None = None
    """Maximum mean difference, in nats per token, between the canary log-probabilities of an engine
    and of the learner; beyond it the version is rejected. None uses 1e-3 if the engine computes in
    float32, else 0.3 (bfloat16 rounding in two kernels)."""
