"""The faults of a drill and their order, drawn from a seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

PROCESSES = ("service", "learner", "actor", "engine", "supervisor")
KINDS = (
    *(f"kill {name}" for name in PROCESSES),
    *(f"stop {name}" for name in PROCESSES),
    *(f"hang {name}" for name in PROCESSES),
    "cut links",
    "refuse links",
    "delay links",
    "stall links",
    "fill disk",
    "truncate journal",
    "damage checkpoint",
    "kill all",
)
"""`stop` is SIGSTOP for less than the peer timeout, `hang` for longer. Both end with SIGCONT."""
FILE_KINDS = ("fill disk", "truncate journal", "damage checkpoint")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    kind: str
    wait_s: float
    """Time from the previous recovery (or, with `overlaps`, the previous fault) to this fault."""
    share: float
    """In [0, 1): selects the actor, the share of a file, or the duration in the kind's range."""
    overlaps: bool = False
    """The fault occurs before the run has recovered from the previous one."""

    def __str__(self) -> str:
        return f"{self.kind} ({self.share:.3f}{', overlapping' if self.overlaps else ''})"


def plan(
    seed: int, count: int, kinds: Sequence[str] = KINDS, *, overlapping: float = 0.15
) -> list[Fault]:
    """`count` faults: every kind once in shuffled order, repeatedly."""
    rng = random.Random(seed)
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += rng.sample(kinds, len(kinds))
    return [
        Fault(
            kind=kind,
            wait_s=rng.uniform(0.0, 1.5),
            share=rng.random(),
            overlaps=index > 0 and rng.random() < overlapping,
        )
        for index, kind in enumerate(chosen[:count])
    ]
