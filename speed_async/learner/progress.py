"""How far the learner has come over all lives of a run: what a checkpoint knows besides tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

MAX_RECENT_LEASES = 65_536
"""Lease ids remembered at most; they must fit into one message (`Resumed`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What one update was made of."""

    policy_version: int  # after it
    lease_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The learner's own counts are cumulative, and count no skipped update's groups."""

    policy_version: int = 0
    service_sequence: int = 0
    """Place in the service's journal up to which this is what the run had come to."""
    num_skipped: int = 0
    """Updates whose step was not finite."""
    groups_trained: int = 0
    completions_trained: int = 0
    tokens_trained: int = 0
    recent_updates: tuple[Update, ...] = ()
    """The updates since the oldest checkpoint that is kept, oldest first: a journal that lost its
    tail may still hold their groups."""
    run_id: str = ""
    """Of the run that made the checkpoint (launcher/identity/identity.py)."""

    def updated(
        self, lease_ids: Sequence[int], *, skipped: bool, completions: int, tokens: int
    ) -> "Progress":
        """After one more update on these groups."""
        update = Update(policy_version=self.policy_version + 1, lease_ids=tuple(lease_ids))
        return replace(
            self,
            policy_version=update.policy_version,
            num_skipped=self.num_skipped + skipped,
            groups_trained=self.groups_trained + (0 if skipped else len(lease_ids)),
            completions_trained=self.completions_trained + (0 if skipped else completions),
            tokens_trained=self.tokens_trained + (0 if skipped else tokens),
            recent_updates=_newest((*self.recent_updates, update)),
        )

    def since(self, policy_version: int) -> "Progress":
        """Without the updates that led to this version: they are in every checkpoint kept."""
        recent = tuple(u for u in self.recent_updates if u.policy_version > policy_version)
        return replace(self, recent_updates=recent)

    @property
    def recent_lease_ids(self) -> list[int]:
        return [lease_id for update in self.recent_updates for lease_id in update.lease_ids]


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What a learner goes on from."""

    progress: Progress
    notices: tuple[str, ...]
    """Of checkpoints that were passed over."""


def _newest(updates: tuple[Update, ...]) -> tuple[Update, ...]:
    """As many of the newest as may be remembered."""
    sizes = accumulate(len(update.lease_ids) for update in reversed(updates))
    num_kept = sum(size <= MAX_RECENT_LEASES for size in sizes)
    return updates[len(updates) - num_kept :]
