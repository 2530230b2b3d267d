"""The part of the service that serves the learner: policy version, batches, weight broadcasts.

consumes   messages of the learner, and those of actors about weights
waits for  nothing
answers    a TakeBatch when enough fresh groups are buffered, or immediately with the recorded
           batch if the learner repeats an update; a PublishWeights with the members of the
           broadcast
"""

from collections.abc import Callable, Sequence

from speed_async.buffer.components import Components
from speed_async.buffer.durability.encoding import StoredGroup
from speed_async.buffer.handlers.effects import Effects, Loss, restart_warning
from speed_async.buffer.priority import BufferedGroup
from speed_async.buffer.reporting.statistics import UpdateTimes
from speed_async.transport import messages as m


class LearnerHandler:
    def __init__(self, components: Components) -> None:
        self._membership = components.membership
        self._lifecycle = components.lifecycle
        self._batches = components.batches
        self._weight_group = components.weight_group
        self._statistics = components.statistics
        self._updates = components.diagnoses.evidence.updates
        self._weight_times = components.weight_times
        self._warnings = components.warnings
        self.handlers: dict[type[m.Message], Callable[..., Effects | None]] = {
            m.Resumed: self._on_resumed,
            m.TakeBatch: self._on_take,
            m.Trained: self._on_trained,
            m.CheckpointSaved: self._on_saved,
            m.PublishWeights: self._on_publish,
            m.WeightsApplied: self._on_applied,
        }
        """Handlers by message class; each receives the peer, the message and the time."""

    def begin_attempt(self) -> None:
        """All processes were restarted: no request is open, and the next broadcast opens a new
        epoch."""
        self._batches.cancel()
        self._lifecycle.groups.return_untrained()
        self._weight_group.reset()

    def poll_batch(self, now_s: float, *, evaluating: bool) -> list[m.Message]:
        """The messages of the requested batch; empty until it is ready."""
        ready = self._batches.poll(now_s, evaluating=evaluating)
        if ready is None:
            return []
        take, groups = ready
        return _batch_messages(take.policy_version, groups)

    def published(self, message: m.WeightsPublished) -> Effects:
        """A broadcast ended. Actors that made it fail are lost."""
        self._weight_times.end(message)
        reason = f"it blocked the weight broadcast: {message.error}"
        what = f"died or was disconnected while it received version {message.policy_version}"
        failed = self._weight_group.published(message)
        return Effects(
            lost=[
                Loss(state=state, reason=reason, warning=restart_warning(state, what))
                for state in failed
            ]
        )

    # --- messages of the learner -------------------------------------------------------------

    def _on_resumed(self, peer: str, resumed: m.Resumed, now_s: float) -> Effects | None:
        """The learner resumed from a checkpoint. It repeats the batches after it from the journal.
        If the journal does not hold them, the service also resumes from that checkpoint; a resume
        from version 0 then fails."""
        version, journal_version = resumed.policy_version, self._lifecycle.groups.policy_version
        notice = f"{resumed.notice}; " if resumed.notice else ""
        if self._lifecycle.groups.lineage.can_replay(version, journal_version):
            warning = f"{notice}resumed from version {version}"
            if version < journal_version:
                warning += f"; updates to {journal_version} are repeated from the journal"
            self._warnings.open("attempt", warning, transient=True)
            return None
        if version == 0:
            text = (
                f"{notice}no checkpoint is left to resume from, and the journal no longer holds "
                f"the updates from the start to {journal_version}: restore a checkpoint from a "
                "backup into the run's checkpoints/, or start a new run"
            )
            return Effects(failure=text)
        self._lifecycle.resume_from(resumed)
        self._updates.covers_all_updates = False
        text = (
            f"{notice}resumed from version {version}, for which the journal (at version "
            f"{journal_version}) is incomplete: the group counts are those of the learner"
        )
        self._warnings.open("attempt", text, transient=True)
        return Effects(messages=[(peer, m.Welcome(policy_version=version))])

    def _on_take(self, peer: str, take: m.TakeBatch, now_s: float) -> Effects | None:
        newest = self._lifecycle.groups.policy_version
        if take.policy_version >= newest:
            self._batches.request(take, now_s)
            return None
        if batch := self._lifecycle.groups.lineage.after(take.policy_version):
            return Effects(to_learner=_batch_messages(take.policy_version, batch.groups))
        reason = f"version {take.policy_version} is outdated: the service is at version {newest}"
        return Effects(messages=[(peer, m.Rejected(reason=reason))])

    def _on_trained(self, peer: str, message: m.Trained, now_s: float) -> Effects | None:
        """Only a new update is an event, not one that is repeated after a resume."""
        if message.notice:
            self._warnings.open("learner", message.notice, transient=True)
        if not self._lifecycle.groups.is_training(message.lease_ids):
            self._lifecycle.groups.lineage.record_repeat(message)
            return None
        self._lifecycle.trained(message)
        self._updates.add(message, late_s=self._batches.late_s, now_s=now_s)
        metrics = message.metrics
        self._statistics.updated(
            UpdateTimes(
                wait_s=metrics.get("time/wait_s", 0.0),
                starved_s=self._batches.starved_s,
                train_s=metrics.get("time/train_s", 0.0),
                sync_s=metrics.get("time/sync_s", 0.0),
                checkpoint_s=metrics.get("time/checkpoint_s", 0.0),
            )
        )
        self._weight_times.stepped(message.policy_version, self._membership.present())
        return Effects(events=[("step", dict(metrics))])

    def _on_saved(self, peer: str, saved: m.CheckpointSaved, now_s: float) -> Effects:
        self._lifecycle.groups.lineage.prune(saved.oldest_kept_version)
        return Effects(snapshot_due=True)

    # --- weights -----------------------------------------------------------------------------

    def _on_publish(self, peer: str, publish: m.PublishWeights, now_s: float) -> Effects:
        self._weight_times.start(now_s)
        offers, members = self._weight_group.form(publish)
        return Effects(messages=offers, to_learner=[members])

    def _on_applied(self, peer: str, message: m.WeightsApplied, now_s: float) -> Effects | None:
        """An actor applied a version or failed to. A failure is shown immediately, before a later
        warning hides it."""
        state = self._membership.actors[peer]
        self._weight_times.applied(message)
        needs_resend = self._weight_group.applied(state, message)
        if not message.error:
            self._warnings.close(f"weights of {peer}")
            return None
        reason = f"{peer} did not apply the weights: {message.error}"
        if not message.usable:  # its next incarnation receives the weights
            loss = Loss(state=state, reason=message.error, warning=reason)
            return Effects(lost=[loss], events=[("status", {})])
        self._warnings.open(f"weights of {peer}", reason)
        resend = [m.MembershipChanged(reason=reason, lost=[])] if needs_resend else []
        return Effects(to_learner=resend, events=[("status", {})])


def _batch_messages(policy_version: int, groups: Sequence[BufferedGroup]) -> list[m.Message]:
    """The groups of a batch, and the message that completes it."""
    lease_ids = [group.lease_id for group in groups]
    ready = m.BatchReady(policy_version=policy_version, lease_ids=lease_ids)
    return [*map(_group_message, groups), ready]


def _group_message(group: BufferedGroup) -> m.Message:
    """The message with this group. Arrays stay in place until its queue has capacity."""
    if group.place is None:
        assert group.message is not None, "a group that is neither in memory nor in a journal"
        return group.message
    segment, offset = group.place
    return StoredGroup(lease_id=group.lease_id, segment=segment, offset=offset)
