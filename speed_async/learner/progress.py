"""Progress of the learner over all attempts of a run: checkpoint state other than tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from speed_async.transport import messages as m

MAX_RECENT_LEASES = 65_536
"""Largest number of lease ids kept; they must fit into one message (`Resumed`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """The batch of one update."""

    policy_version: int  # after the update
    lease_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Cumulative counts of the learner. Groups of skipped batches are not counted."""

    policy_version: int = 0
    service_sequence: int = 0
    """Sequence number of the service's journal that corresponds to this progress."""
    optimizer_updates: int = 0
    """Steps of the optimiser: learner.passes x learner.minibatches per batch, without the skipped
    ones."""
    num_skipped: int = 0
    """Optimiser updates skipped because a value was not finite."""
    groups_trained: int = 0
    completions_trained: int = 0
    tokens_trained: int = 0
    recent_updates: tuple[Update, ...] = ()
    """Updates since the oldest kept checkpoint, oldest first. A journal that lost its tail may
    still contain their groups."""
    run_id: str = ""
    """Id of the run that wrote the checkpoint (launcher/identity/identity.py)."""

    def updated(
        self,
        lease_ids: Sequence[int],
        *,
        optimizer_updates: int,
        num_skipped: int,
        completions: int,
        tokens: int,
    ) -> "Progress":
        """Progress after one more batch, of these groups. Both numbers of optimiser updates are
        those of the batch; without any, its groups are not counted as trained."""
        skipped = optimizer_updates == 0
        update = Update(policy_version=self.policy_version + 1, lease_ids=tuple(lease_ids))
        return replace(
            self,
            policy_version=update.policy_version,
            optimizer_updates=self.optimizer_updates + optimizer_updates,
            num_skipped=self.num_skipped + num_skipped,
            groups_trained=self.groups_trained + (0 if skipped else len(lease_ids)),
            completions_trained=self.completions_trained + (0 if skipped else completions),
            tokens_trained=self.tokens_trained + (0 if skipped else tokens),
            recent_updates=_newest((*self.recent_updates, update)),
        )

    def since(self, policy_version: int) -> "Progress":
        """Progress without the updates up to this version, which every kept checkpoint includes."""
        recent = tuple(u for u in self.recent_updates if u.policy_version > policy_version)
        return replace(self, recent_updates=recent)

    def resumed(self, *, notice: str) -> m.Resumed:
        """Of a learner that resumes with this progress."""
        return m.Resumed(
            policy_version=self.policy_version,
            service_sequence=self.service_sequence,
            groups_trained=self.groups_trained,
            completions_trained=self.completions_trained,
            tokens_trained=self.tokens_trained,
            recent_lease_ids=self.recent_lease_ids,
            notice=notice,
        )

    def trained(
        self,
        lease_ids: Sequence[int],
        *,
        skipped: bool,
        metrics: dict[str, float],
        notice: str,
    ) -> m.Trained:
        """Of a learner that has trained these groups last."""
        return m.Trained(
            policy_version=self.policy_version,
            lease_ids=[*lease_ids],
            skipped=skipped,
            groups_trained=self.groups_trained,
            completions_trained=self.completions_trained,
            tokens_trained=self.tokens_trained,
            metrics=metrics,
            notice=notice,
        )

    @property
    def recent_lease_ids(self) -> list[int]:
        return [lease_id for update in self.recent_updates for lease_id in update.lease_ids]


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """State from which a learner resumes."""

    progress: Progress
    notices: tuple[str, ...]
    """Notices about damaged checkpoints that were skipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """Result of the run."""

    reason: str
    outcome: str
    """"completed", "stopped" or "nothing_learned" (observability/metrics.py)."""
    progress: Progress
    accuracy_reached: float | None
    """The held-out accuracy that ended the run (`run.stop_at_accuracy`), if one did."""
    save_error: str
    """Why the last checkpoint is missing; empty when it was saved."""
    notices: tuple[str, ...]
    """Human-readable notices of this attempt."""
    service_fields: dict[str, object]


def _newest(updates: tuple[Update, ...]) -> tuple[Update, ...]:
    """The newest updates with at most MAX_RECENT_LEASES lease ids."""
    sizes = accumulate(len(update.lease_ids) for update in reversed(updates))
    num_kept = sum(size <= MAX_RECENT_LEASES for size in sizes)
    return updates[len(updates) - num_kept :]
