"""Transfer speed of weights, pauses of the actors, and the version lag of each actor."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from speed_async.buffer.membership import ActorState
from speed_async.observability.metrics import Value
from speed_async.transport.messages import WeightsApplied, WeightsPublished


@dataclass(kw_only=True, slots=True)
class Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(kw_only=True, slots=True)
class WeightTimes:
    """Current values (`values`) and totals of the run (`summary`)."""

    num_failed: int = 0
    began_s: float | None = None
    """Start of the broadcast in progress."""
    published_version: int = 0
    applied_version: int = 0
    """The newest version that any actor has applied."""
    pauses_s: list[int | float] = field(default_factory=list)
    """Pauses of the actors that have applied it."""
    transfer_s: int | float | None = None
    bytes_per_s: float | None = None
    all_pauses: Mean = field(default_factory=Mean)
    all_transfers: Mean = field(default_factory=Mean)
    all_lags: Mean = field(default_factory=Mean)
    all_bytes: int = 0

    def start(self, now_s: float) -> None:
        self.began_s = now_s

    def end(self, message: WeightsPublished) -> None:
        self.began_s = None
        if message.error:
            self.num_failed += 1
            return
        self.published_version = message.policy_version
        if message.num_bytes:
            self.transfer_s = message.transfer_s
            self.bytes_per_s = message.num_bytes / max(message.transfer_s, 1e-9)
            self.all_transfers.add(message.transfer_s)
            self.all_bytes += message.num_bytes

    def applied(self, message: WeightsApplied) -> None:
        if message.error:
            return
        if message.policy_version > self.applied_version:
            self.applied_version, self.pauses_s = message.policy_version, []
        if message.policy_version == self.applied_version:
            self.pauses_s.append(message.pause_s)
        self.all_pauses.add(message.pause_s)

    def stepped(self, policy_version: int, present: Sequence[ActorState]) -> None:
        """Record an update and the version lag of each actor."""
        for state in present:
            self.all_lags.add(policy_version - state.applied_version)

    def values(
        self, policy_version: int, present: Sequence[ActorState], now_s: float
    ) -> dict[str, Value]:
        """Keys: observability/metrics.py."""
        lags = {f"actor-{s.index}": policy_version - s.applied_version for s in present}
        pauses_s = self.pauses_s
        publishing_s = 0.0 if self.began_s is None else now_s - self.began_s
        values: dict[str, Value] = {
            "weights/pause_s": sum(pauses_s) / len(pauses_s) if pauses_s else None,
            "weights/pause_max_s": max(pauses_s, default=None),
            "weights/transfer_s": self.transfer_s,
            "weights/bytes_per_s": self.bytes_per_s,
            "weights/publishing_s": round(publishing_s, 3),
            "weights/failed": self.num_failed,
            "weights/lag_max": max(lags.values(), default=None),
            "weights/newest": sum(s.applied_version >= self.published_version for s in present),
        }
        return values | {f"weights/lag/{name}": lag for name, lag in lags.items()}

    def summary(self) -> dict[str, object]:
        """Means over the run, for summary.json."""
        transfers = self.all_transfers
        return {
            "pause_s": self.all_pauses.value,
            "transfer_s": transfers.value,
            "bytes_per_s": self.all_bytes / transfers.total if transfers.total else None,
            "lag": self.all_lags.value,
            "broadcasts": transfers.count,
            "failed": self.num_failed,
        }
