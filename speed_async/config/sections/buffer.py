"""`[buffer]`: capacity, staleness and order of groups."""

from typing import Literal

from speed_async.config.sections.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class BufferConfig(Section):
    capacity_groups: PositiveInt | None = None
    """Maximum number of buffered groups. Beyond it the group of lowest priority is evicted. None:
    the number of credits, at least 256."""
    capacity_bytes: PositiveInt = 1024 * 1024 * 1024
    """Maximum array bytes of buffered groups, with the same eviction."""
    credits: PositiveInt | None = None
    """Maximum number of groups that are leased, buffered or in training. None: (`max_staleness`
    + 1) x `learner.groups_per_update`. With a higher number, groups become stale."""
    durability: Literal["none", "batched", "every"] = "batched"
    """Durability of the journal. `batched`: a killed process loses nothing, a power failure at most
    the last second. `every`: neither loses data; each acknowledgement waits for the disk. `none`:
    no journal, and the run cannot be resumed."""
    spill: bool = False
    """Keep groups beyond `capacity_bytes` in the journal on disk instead of blocking the actors."""
    lease_timeout_s: PositiveFloat = 3600.0
    """Time after which an unfinished prompt is leased to another actor; a late result still counts
    once."""
    max_staleness: NonNegativeInt = 2
    """Maximum age in policy versions of a token used for training."""
    late_groups: Literal["wait", "drop"] = "wait"
    """Groups that are still being generated and that the next update would make stale. `wait`: the
    update waits for them, at most half of `cluster.stall_timeout_s`. `drop`: it does not, so fewer
    long completions are trained than are generated."""
    order: Literal["auto", "signal", "arrival"] = "auto"
    """Order of buffered groups whose oldest tokens are of the same version; older tokens always
    come first. `signal`: by p(1 - p) of the pass rate p of the group, the largest first. `arrival`:
    first in, first out. `auto`: `arrival` if `gate.mode` is `off`, so that groups without signal
    wait no longer than others, else `signal`."""
