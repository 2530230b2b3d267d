"""The part of the service that serves the learner: policy version, batches, weight broadcasts.

consumes   messages of the learner
waits for  nothing
answers    a TakeBatch when enough fresh groups are buffered, or immediately with the recorded
           batch if the learner repeats an update; a PublishWeights with the members of the
           broadcast
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from speed_async.buffer.batches import Batches
from speed_async.buffer.durability.stored import batch_message
from speed_async.buffer.lifecycle import Lifecycle
from speed_async.buffer.membership import ActorState, Membership
from speed_async.buffer.priority import BufferedGroup
from speed_async.buffer.reporting.evidence import Updates
from speed_async.buffer.reporting.statistics import RunStatistics, UpdateTimes
from speed_async.buffer.reporting.warnings import Warnings
from speed_async.buffer.reporting.weight_times import WeightTimes
from speed_async.buffer.weight_group import WeightGroup
from speed_async.config.schema import Config
from speed_async.observability.metrics import EventKind, Value
from speed_async.transport import messages as m


class ServiceContext(Protocol):
    """The operations of the service that the handler uses (service.py)."""

    warnings: Warnings

    def send(self, peer: str, message: m.Message) -> None: ...
    def lose(self, state: ActorState, reason: str, warning: str = "") -> None: ...
    def fail(self, text: str, now_s: float) -> None: ...
    def emit(self, kind: EventKind, now_s: float, values: dict[str, Value]) -> None: ...


class LearnerHandler:
    CONFIGURED = ("handlers", "_context")

    def __init__(
        self,
        config: Config,
        context: ServiceContext,
        *,
        membership: Membership,
        lifecycle: Lifecycle,
        statistics: RunStatistics,
        updates: Updates,
    ) -> None:
        self.policy_version = 0
        """Newest trained version."""
        self.batches = Batches(config, lifecycle)
        self.weight_group = WeightGroup(membership)
        self.weight_times = WeightTimes()
        self._context = context
        self._membership = membership
        self._lifecycle = lifecycle
        self._statistics = statistics
        self._updates = updates
        self.handlers: dict[type[m.Message], Callable[..., None]] = {
            m.Resumed: self._on_resumed,
            m.TakeBatch: self._on_take,
            m.Trained: self._on_trained,
            m.PublishWeights: self._on_publish,
        }
        """Handlers by message class; each receives the peer, the message and the time."""

    def send(self, message: m.Message) -> None:
        """Send a message to the learner if it is connected."""
        if self._membership.learner is not None:
            self._context.send(self._membership.learner, message)

    def begin_attempt(self) -> None:
        """All processes were restarted: no request is open, and the next broadcast opens a new
        epoch."""
        self._membership.learner = None
        self.batches.cancel()
        self._lifecycle.return_untrained()
        self.weight_group.reset()

    def answer_take(self, now_s: float, *, evaluating: bool) -> None:
        """Send the requested batch if it is ready."""
        ready = self.batches.poll(now_s, evaluating=evaluating)
        if ready is None:
            return
        take, groups = ready
        self._send_batch(take.policy_version, groups)

    def published(self, message: m.WeightsPublished) -> None:
        """A broadcast ended. Actors that made it fail are declared lost."""
        self.weight_times.ended(message)
        for state in self.weight_group.published(message):
            warning = f"died or was disconnected while it received version {message.policy_version}"
            self._context.lose(state, f"it blocked the weight broadcast: {message.error}", warning)

    def applied(self, peer: str, message: m.WeightsApplied) -> bool:
        """An actor applied a version or failed to. Returns whether it must receive it again."""
        self.weight_times.applied(message)
        return self.weight_group.applied(self._membership.actors[peer], message)

    # --- messages of the learner -------------------------------------------------------------

    def _on_resumed(self, peer: str, resumed: m.Resumed, now_s: float) -> None:
        """The learner resumed from a checkpoint. It repeats the batches after it from the journal.
        If the journal does not hold them, the service also resumes from that checkpoint; a resume
        from version 0 then fails."""
        version, journal_version = resumed.policy_version, self.policy_version
        notice = f"{resumed.notice}; " if resumed.notice else ""
        if self._lifecycle.lineage.can_replay(version, journal_version):
            warning = f"{notice}resumed from version {version}"
            if version < journal_version:
                warning += f"; updates to {journal_version} are repeated from the journal"
            self._context.warnings.open("attempt", warning, transient=True)
            return
        if version == 0:
            text = (
                f"{notice}no checkpoint is left to resume from, and the journal no longer holds "
                f"the updates from the start to {journal_version}: restore a checkpoint from a "
                "backup into the run's checkpoints/, or start a new run"
            )
            self._context.fail(text, now_s)
            return
        self._lifecycle.resume_from(resumed)
        self._updates.covers_all_updates = False
        self.policy_version = version
        text = (
            f"{notice}resumed from version {version}, for which the journal (at version "
            f"{journal_version}) is incomplete: the group counts are those of the learner"
        )
        self._context.warnings.open("attempt", text, transient=True)
        self._context.send(peer, m.Welcome(policy_version=version))

    def _on_take(self, peer: str, take: m.TakeBatch, now_s: float) -> None:
        if take.policy_version >= self.policy_version:
            self.batches.request(take, now_s)
        elif batch := self._lifecycle.lineage.after(take.policy_version):
            self._send_batch(take.policy_version, batch.groups)
        else:
            reason = (
                f"version {take.policy_version} is outdated: the service is at version "
                f"{self.policy_version}"
            )
            self._context.send(peer, m.Rejected(reason=reason))

    def _send_batch(self, policy_version: int, groups: Sequence[BufferedGroup]) -> None:
        for group in groups:
            self.send(batch_message(group))
        lease_ids = [group.lease_id for group in groups]
        self.send(m.BatchReady(policy_version=policy_version, lease_ids=lease_ids))

    def _on_trained(self, peer: str, message: m.Trained, now_s: float) -> None:
        if message.notice:
            self._context.warnings.open("learner", message.notice, transient=True)
        if not self._lifecycle.is_training(message.lease_ids):
            self._lifecycle.lineage.record_repeat(message)
            return
        self._lifecycle.trained(message)
        self._updates.add(message)
        self.policy_version = message.policy_version
        metrics = message.metrics
        self._statistics.updated(
            UpdateTimes(
                wait_s=metrics.get("time/wait_s", 0.0),
                starved_s=self.batches.starved_s,
                train_s=metrics.get("time/train_s", 0.0),
                sync_s=metrics.get("time/sync_s", 0.0),
            )
        )
        self.weight_times.stepped(self.policy_version, self._membership.present())
        self._context.emit("step", now_s, dict(metrics))

    def _on_publish(self, peer: str, publish: m.PublishWeights, now_s: float) -> None:
        self.weight_times.began(now_s)
        offers, members = self.weight_group.form(publish)
        for name, offer in offers:
            self._context.send(name, offer)
        self.send(members)
