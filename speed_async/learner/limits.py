"""Limits of the learner's memory, without torch: the preflight checks compute with them as well."""

MAX_LOGITS = 1 << 26
"""Largest number of logits in one chunk (N x V): 256 MiB in float32 for any vocabulary."""
CHECKPOINTING_PARAMETERS = 300_000_000
"""Number of parameters from which models on a GPU recompute activations in the backward pass."""
