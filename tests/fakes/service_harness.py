"""A buffer service with a manual clock, driven by messages."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from speed_async.buffer.handlers.effects import Results
from speed_async.buffer.service import BufferService
from speed_async.buffer.state import ServiceState
from speed_async.observability.metrics import Event
from speed_async.transport import messages as m
from speed_async.types import ActorCounts
from tests.fakes.buffer_fixtures import make_config


class ServiceHarness:
    """Drives a BufferService. Each input returns the messages that it causes, with their peers."""

    def __init__(
        self,
        folder: Path,
        num_held_out: int = 1,
        *,
        suite_sizes: Mapping[str, int] = MappingProxyType({}),
        state: ServiceState | None = None,
        **sections: Mapping[str, object],
    ) -> None:
        (folder / "config.json").write_text("{}")
        self.config = make_config(str(folder), **sections)
        self.service = BufferService(
            self.config,
            num_prompts=100,
            num_held_out=num_held_out,
            suite_sizes=suite_sizes,
            fingerprint="f",
            started_s=0.0,
            state=state,
        )
        self.now_s = 0.0
        self.events: list[Event] = []

    def send(self, peer: str, message: m.Message) -> list[tuple[str, m.Message]]:
        """Send a message of a peer to the service."""
        return self.record(self.service.handle(peer, message, self.now_s))

    def wait(self, seconds: float) -> list[tuple[str, m.Message]]:
        """Advance the clock and tick once."""
        self.now_s += seconds
        return self.record(self.service.tick(self.now_s))

    def record(self, results: Results) -> list[tuple[str, m.Message]]:
        """Keep the events of these results; returns the messages."""
        self.events += results.events
        return results.messages

    def hello(self, peer: str, index: int, incarnation: int = 0) -> list[tuple[str, m.Message]]:
        role = "learner" if peer == "learner" else "actor"
        return self.send(
            peer,
            m.Hello(role=role, index=index, incarnation=incarnation, fingerprint="f", process_id=1),
        )

    def pass_baseline(self, actor: str = "actor-1.0") -> None:
        """Connect learner and actor, and complete the first evaluation (one prompt, one token)."""
        self.hello("learner", 0)
        self.hello(actor, 1)
        [(_, leases)] = self.send(actor, m.WantWork(num_prompts=1, counts=ActorCounts()))
        assert isinstance(leases, m.Leases)
        assert leases.kind == "evaluation"
        counts = ActorCounts(groups_leased=1, tokens_generated=1)
        self.send(actor, evaluated(leases.lease_ids[0], counts=counts))

    def lease(self, count: int, actor: str = "actor-1.0") -> m.Leases:
        replies = self.send(actor, m.WantWork(num_prompts=count, counts=self.counts(actor)))
        [leases] = [message for _, message in replies if isinstance(message, m.Leases)]
        return leases

    def counts(self, actor: str) -> ActorCounts:
        return self.service.lifecycle.ledger.actor(actor).last_counts

    def ends(self) -> dict[str, tuple[int, int]]:
        tallies = self.service.lifecycle.ledger.ends
        return {str(end): (t.groups, t.tokens) for end, t in tallies.items() if t.groups}


def kinds(replies: list[tuple[str, m.Message]]) -> list[str]:
    return [type(message).__name__ for _, message in replies]


def trained(version: int, lease_ids: list[int], groups: int, tokens: int) -> m.Trained:
    return m.Trained(
        policy_version=version,
        lease_ids=lease_ids,
        skipped=False,
        groups_trained=groups,
        completions_trained=4 * groups,
        tokens_trained=tokens,
        metrics={},
    )


def screened_out(lease_id: int, num_passed: int = 0, num_truncated: int = 0) -> m.ScreenedOut:
    """Two completions of three tokens."""
    return m.ScreenedOut(
        lease_id=lease_id,
        num_passed=num_passed,
        num_completions=2,
        num_truncated=num_truncated,
        num_tokens=6,
        counts=ActorCounts(),
    )


def evaluated(
    lease_id: int, *, num_completions: int = 1, counts: ActorCounts | None = None
) -> m.Evaluated:
    """Completions of one token of version 0, one of which passed."""
    return m.Evaluated(
        lease_id=lease_id,
        num_passed=1,
        num_completions=num_completions,
        num_truncated=0,
        num_tokens=num_completions,
        oldest_version=0,
        newest_version=0,
        counts=counts or ActorCounts(),
    )


def failed(lease_id: int, reason: str) -> m.LeaseFailed:
    """A lease that ended before anything was generated."""
    return m.LeaseFailed(
        lease_id=lease_id, reason=reason, num_completions=0, num_tokens=0, counts=ActorCounts()
    )
