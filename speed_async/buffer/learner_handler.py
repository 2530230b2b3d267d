"""The learner's half of the service: which version it stands at, its batches, its broadcasts.

consumes   messages of the learner
waits for  nothing
answers    a TakeBatch when enough fresh groups are buffered, or at once with the batch that
           followed, where the learner trains it again; a PublishWeights with who takes part
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from speed_async.buffer.batches import Batches
from speed_async.buffer.durability.stored import batch_message
from speed_async.buffer.group_table import BufferedGroup
from speed_async.buffer.lifecycle import Lifecycle
from speed_async.buffer.membership import ActorState, Membership
from speed_async.buffer.reporting.evidence import Updates
from speed_async.buffer.reporting.statistics import RunStatistics, UpdateTimes
from speed_async.buffer.reporting.warnings import Warnings
from speed_async.buffer.reporting.weight_times import WeightTimes
from speed_async.buffer.weight_group import WeightGroup
from speed_async.config.schema import Config
from speed_async.observability.metrics import EventKind, Value
from speed_async.transport import messages as m


class ServiceContext(Protocol):
    """What the desk has the service do (service.py)."""

    warnings: Warnings

    def send(self, peer: str, message: m.Message) -> None: ...
    def lose(self, state: ActorState, reason: str, told: str = "") -> None: ...
    def fail(self, text: str, now_s: float) -> None: ...
    def emit(self, kind: EventKind, now_s: float, values: dict[str, Value]) -> None: ...


class LearnerHandler:
    CONFIGURED = ("handlers", "_house")

    def __init__(
        self,
        config: Config,
        house: ServiceContext,
        *,
        membership: Membership,
        lifecycle: Lifecycle,
        statistics: RunStatistics,
        updates: Updates,
    ) -> None:
        self.policy_version = 0
        """The newest that was trained."""
        self.batches = Batches(config, lifecycle)
        self.weight_group = WeightGroup(membership)
        self.weight_times = WeightTimes()
        self._house = house
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
        """Called with the peer, the message and the time."""

    def say(self, message: m.Message) -> None:
        """To the learner, if it is here."""
        if self._membership.learner is not None:
            self._house.send(self._membership.learner, message)

    def begin_attempt(self) -> None:
        """All processes were started again: nothing is asked for, and the next broadcast needs a
        new epoch."""
        self._membership.learner = None
        self.batches.withdraw()
        self._lifecycle.return_untrained()
        self.weight_group.forget()

    def answer_take(self, now_s: float, *, evaluating: bool) -> None:
        """Hand out the batch that was asked for, once it may be given."""
        answer = self.batches.answer(now_s, evaluating=evaluating)
        if answer is None:
            return
        take, groups = answer
        self._send_batch(take.policy_version, groups)

    def published(self, message: m.WeightsPublished) -> None:
        """A broadcast ended; whoever is to blame for its failure is lost."""
        self.weight_times.ended(message)
        for state in self.weight_group.published(message):
            told = f"died or was cut off while version {message.policy_version} was sent to it"
            self._house.lose(state, f"it held up the weights: {message.error}", told)

    def applied(self, peer: str, message: m.WeightsApplied) -> bool:
        """An actor has loaded a version, or could not. Returns whether it needs it once more."""
        self.weight_times.applied(message)
        return self.weight_group.applied(self._membership.actors[peer], message)

    # --- its messages ------------------------------------------------------------------------

    def _on_resumed(self, peer: str, resumed: m.Resumed, now_s: float) -> None:
        """The learner stands at a checkpoint. It gets the batches since then once more, or, where
        the journal does not have them, the service goes on from there as well; but not from
        nothing."""
        version, journal_version = resumed.policy_version, self.policy_version
        notice = f"{resumed.notice}; " if resumed.notice else ""
        if self._lifecycle.lineage.leads(version, journal_version):
            warning = f"{notice}resumed from version {version}"
            if version < journal_version:
                warning += f"; updates to {journal_version} are trained again, as recorded"
            self._house.warnings.open("life", warning, fleeting=True)
            return
        if version == 0:
            text = (
                f"{notice}no checkpoint is left to go on from, and the journal does not hold the "
                f"updates from the start to {journal_version} any more: bring a checkpoint back "
                "from a copy into the run's checkpoints/, or start a new run"
            )
            self._house.fail(text, now_s)
            return
        self._lifecycle.adopt(resumed)
        self._updates.all_known = False
        self.policy_version = version
        text = (
            f"{notice}resumed from version {version}, of which the journal (at {journal_version}) "
            "lacks a part: groups are counted by the learner's word"
        )
        self._house.warnings.open("life", text, fleeting=True)
        self._house.send(peer, m.Welcome(policy_version=version))

    def _on_take(self, peer: str, take: m.TakeBatch, now_s: float) -> None:
        if take.policy_version >= self.policy_version:
            self.batches.ask(take, now_s)
        elif batch := self._lifecycle.lineage.after(take.policy_version):
            self._send_batch(take.policy_version, batch.groups)
        else:
            reason = f"version {take.policy_version} is past: the service is at "
            self._house.send(peer, m.Rejected(reason=reason + str(self.policy_version)))

    def _send_batch(self, policy_version: int, groups: Sequence[BufferedGroup]) -> None:
        for group in groups:
            self.say(batch_message(group))
        lease_ids = [group.lease_id for group in groups]
        self.say(m.BatchReady(policy_version=policy_version, lease_ids=lease_ids))

    def _on_trained(self, peer: str, message: m.Trained, now_s: float) -> None:
        if message.notice:
            self._house.warnings.open("learner", message.notice, fleeting=True)
        if not self._lifecycle.is_training(message.lease_ids):
            self._lifecycle.lineage.repeated(message)
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
        self._house.emit("step", now_s, dict(metrics))

    def _on_publish(self, peer: str, publish: m.PublishWeights, now_s: float) -> None:
        self.weight_times.began(now_s)
        offers, members = self.weight_group.form(publish)
        for name, offer in offers:
            self._house.send(name, offer)
        self.say(members)
