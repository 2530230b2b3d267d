"""Limits of the learner's memory, without torch: the preflight checks compute with them as well."""

from speed_async.config.sections.learner import ActivationCheckpointing

MAX_LOGITS = 1 << 26
"""Largest number of logits in one chunk (N x V): 256 MiB in float32 for any vocabulary."""
CHECKPOINTING_PARAMETERS = 300_000_000
"""Number of parameters from which models on a GPU recompute activations in the backward pass."""


def num_shards(learners: int, *, ranks_per_node: int) -> int:
    """Learners that divide the parameters: those of a node if learners fill several nodes, which
    then have replicas (HSDP), else all."""
    fills_nodes = 1 < ranks_per_node < learners and learners % ranks_per_node == 0
    return ranks_per_node if fills_nodes else learners


def resolved_checkpointing(
    choice: ActivationCheckpointing, num_parameters: int, *, on_gpu: bool
) -> ActivationCheckpointing:
    """What `learner.activation_checkpointing` means for a model: not `auto`."""
    if choice != "auto":
        return choice
    return "full" if on_gpu and num_parameters >= CHECKPOINTING_PARAMETERS else "none"
