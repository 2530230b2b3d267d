"""Keys of a sample event."""

SAMPLE_KEYS = {
    "wall_s",
    "policy_version",
    "actor",
    "prompt_id",
    "held_out",
    "decision",
    "reward",
    "passed",
    "extracted",
    "truncated",
    "num_tokens",
    "prompt",
    "completion",
}
