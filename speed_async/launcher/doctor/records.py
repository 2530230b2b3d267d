"""What the processes of `speed-async doctor` exchange, as JSON. Does not import torch."""

from dataclasses import dataclass, field

from pydantic import TypeAdapter

GLOO, NCCL = "gloo", "nccl"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankJob:
    """The order to one rank process: its only argument."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str
    port: int
    """Of the store of rank 0."""
    listener: int | None = None
    """Rank 0: file descriptor of the socket that listens at this port."""
    timeout_s: float
    parent_id: int
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests by name (model, data) of this node's files."""
    shared_folder: str | None = None
    """On a node with learners: where all nodes with learners must see the same files."""
    shared_file: str | None = None
    """Rank 0: name of a file that exists in its `shared_folder`."""

    @property
    def leads_node(self) -> bool:
        return self.local_rank == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    name: str
    free_bytes: int
    total_bytes: int
    capability: str
    """Compute capability, such as 9.0."""
    has_bfloat16: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFacts:
    """What a rank tells all others before they measure anything."""

    rank: int
    node: int
    world_size: int
    host_name: str
    versions: dict[str, str]
    has_own_gpu: bool = False
    gpus: list[Gpu] = field(default_factory=list)
    """All visible GPUs; only of the first rank of a node."""
    inputs: dict[str, str] = field(default_factory=dict)
    shared_file: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Attendance:
    """What rank 0 tells all others: who takes part."""

    world_size: int
    missing: list[int]
    """Ranks that did not connect in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReport:
    """What a rank measured."""

    rank: int
    round_trip_s: float | None = None
    """To rank 0 and back, the shortest of several."""
    clock_offset_s: float | None = None
    """Its wall clock minus that of rank 0."""
    all_reduce_s: dict[str, float] = field(default_factory=dict)
    """Duration by backend, for tensors of ALL_REDUCE_BYTES."""
    faults: dict[str, str] = field(default_factory=dict)
    """Errors by backend."""
    sees_shared_file: bool | None = None
    """None: not asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """What one rank knows at the end."""

    facts: list[RankFacts] = field(default_factory=list)
    reports: list[RankReport] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    """Ranks that did not connect in time."""
    silent: list[int] = field(default_factory=list)
    """Ranks that connected, and did not report."""
    fault: str | None = None
    """Why this rank could not do its part, with the remedy."""


ALL_REDUCE_BYTES = {GLOO: 1 << 24, NCCL: 1 << 27}
JOB, FACTS = TypeAdapter(RankJob), TypeAdapter(RankFacts)
ATTENDANCE = TypeAdapter(Attendance)
REPORT, EXCHANGE = TypeAdapter(RankReport), TypeAdapter(Exchange)
