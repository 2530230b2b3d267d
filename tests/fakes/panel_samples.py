"""A sample event."""

from speed_async.observability.metrics import Value

SAMPLE: dict[str, Value] = {
    "wall_s": 61.0,
    "policy_version": 11,
    "actor": "actor-1.0",
    "prompt_id": "17",
    "held_out": False,
    "decision": "screened out",
    "reward": 0.0,
    "extracted": "71",
    "truncated": True,
    "num_tokens": 64,
    "prompt": "How many clips did she sell? " * 20,
    "completion": "She sold 48 / 2 = 24 clips in May.\n" * 20 + "So it is 71",
}
