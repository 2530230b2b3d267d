"""The learner's broadcasts when members fail: reported ranks, excluded actors, final errors."""

import asyncio
from collections.abc import Collection, Iterable, Iterator, Sequence

import pytest
import torch

from speed_async.config.sections.weights import WeightsConfig
from speed_async.errors import WeightSyncError
from speed_async.learner.inbox import Inbox
from speed_async.learner.publisher import (
    MAX_FURTHER_BROADCASTS,
    MAX_UNEXPLAINED_FAILURES,
    Publisher,
)
from speed_async.learner.trainer import Trainer
from speed_async.transport import messages as m
from speed_async.types import WeightOffer
from speed_async.weight_sync.canary_check import Canary
from speed_async.weight_sync.channel import NamedTensor, TransferReport, WholeTensors

DEADLINE_S = 30.0


class Service:
    """A link to a service that excludes actors reported as missing."""

    def __init__(self, ranks: dict[str, int]) -> None:
        self.ranks = ranks
        self.published: list[m.WeightsPublished] = []
        self._epoch = 0
        self.messages: asyncio.Queue[m.Message] = asyncio.Queue()

    async def send(self, message: m.Message) -> None:
        if isinstance(message, m.PublishWeights):
            self._epoch += 1
            self.messages.put_nowait(self._members())
        if isinstance(message, m.WeightsPublished):
            self.published.append(message)
            for name in message.missing:
                del self.ranks[name]

    async def receive(self, deadline_s: float) -> m.Message:
        message = await self.messages.get()
        self.messages.task_done()
        return message

    def _members(self) -> m.WeightMembers:
        return m.WeightMembers(
            policy_version=3,
            epoch=self._epoch,
            actor_names=[*self.ranks],
            ranks_each=[*self.ranks.values()],
            world_size=1 + sum(self.ranks.values()),
        )

    async def close(self) -> None:
        pass


class FailingSender:
    """Fails once per entry of `failures`, and reports its ranks as missing."""

    store_address = ("127.0.0.1", 1)

    def __init__(self, failures: list[Sequence[int]]) -> None:
        self.failures = failures
        self.offers: list[WeightOffer] = []
        self.lost: list[set[int]] = []

    def send(
        self,
        offer: WeightOffer,
        tensors: Iterable[NamedTensor],
        canary: Canary | None = None,
        lost: Collection[int] = (),
        whole: WholeTensors | None = None,
    ) -> TransferReport:
        self.offers.append(offer)
        self.lost.append({*lost})
        if self.failures:
            raise WeightSyncError("manifest failed", missing_ranks=self.failures.pop(0))
        return TransferReport(num_bytes=8, num_buckets=1, transfer_s=0.0)

    def close(self) -> None:
        pass


class Weights(Trainer):
    """A trainer without a model."""

    def __init__(self) -> None: ...

    def weights(self) -> Iterator[NamedTensor]:
        yield "w", torch.ones(2)

    def whole(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return dict(self.weights())

    def canary(self) -> Canary:
        return Canary(token_ids=(1, 2), logprobs=(-0.5,))


class WaitingSender(FailingSender):
    """Waits in its first call until the learner has received a message of the service, and reports
    the ranks that are lost by then as missing."""

    def __init__(self, service: Service, message: m.Message) -> None:
        super().__init__([])
        self._service, self._message = service, message
        self._loop = asyncio.get_running_loop()

    def send(
        self,
        offer: WeightOffer,
        tensors: Iterable[NamedTensor],
        canary: Canary | None = None,
        lost: Collection[int] = (),
        whole: WholeTensors | None = None,
    ) -> TransferReport:
        if not self.offers:
            asyncio.run_coroutine_threadsafe(self._deliver(), self._loop).result(DEADLINE_S)
            self.failures += [[*lost]] if lost else []
        return super().send(offer, tensors, canary, lost, whole)

    async def _deliver(self) -> None:
        self._service.messages.put_nowait(self._message)
        await self._service.messages.join()


def make_publisher(service: Service, sender: FailingSender, inbox: Inbox) -> Publisher:
    return Publisher(
        WeightsConfig(),
        link=service,
        inbox=inbox,
        trainer=Weights(),
        sender=sender,
        backend="gloo",
        timeout_s=20.0,
    )


def publish(service: Service, sender: FailingSender) -> None:
    asyncio.run(make_publisher(service, sender, Inbox(service)).publish(3))


def publish_and_receive(ranks: dict[str, int], change: m.MembershipChanged) -> WaitingSender:
    """Publishes while a batch and then this change arrive."""

    async def run() -> WaitingSender:
        service = Service(ranks)
        inbox, sender = Inbox(service), WaitingSender(service, change)
        batch = m.BatchReady(policy_version=3, lease_ids=[])
        service.messages.put_nowait(batch)
        await make_publisher(service, sender, inbox).publish(3)
        assert await inbox.next(DEADLINE_S) == batch
        assert [each.missing for each in service.published] == [change.lost, []]
        return sender

    return asyncio.run(run())


def test_a_member_that_is_lost_during_a_broadcast_is_excluded_without_waiting_for_it() -> None:
    lost = m.MembershipChanged(reason="actor-2.0 is lost", lost=["actor-2.0"])
    sender = publish_and_receive({"actor-1.0": 1, "actor-2.0": 2}, lost)
    assert [offer.world_size for offer in sender.offers] == [4, 2]


def test_an_actor_that_joins_during_a_broadcast_is_served_after_it() -> None:
    """Not later: the learner may begin an update meanwhile, which may take minutes."""
    joined = m.MembershipChanged(reason="actor-2.0 joined", lost=[])
    sender = publish_and_receive({"actor-1.0": 1}, joined)
    assert [offer.policy_version for offer in sender.offers] == [3, 3]


@pytest.mark.parametrize("lost", [[], ["actor-2.0"]])
def test_a_change_that_arrives_together_with_the_members_is_not_superseded(
    lost: list[str],
) -> None:
    class HastyService(Service):
        async def send(self, message: m.Message) -> None:
            await super().send(message)
            if isinstance(message, m.PublishWeights) and self.num_changes == 0:
                self.num_changes += 1
                self.messages.put_nowait(m.MembershipChanged(reason="changed", lost=lost))

        num_changes = 0

    service = HastyService({"actor-1.0": 1, "actor-2.0": 1})
    publish(service, sender := FailingSender([]))
    assert len(sender.offers) == 2
    assert sender.lost == [{2} if lost else set(), set()]


def test_joining_actors_delay_the_next_step_for_a_bounded_number_of_broadcasts() -> None:
    class CrowdedService(Service):
        async def send(self, message: m.Message) -> None:
            await super().send(message)
            if isinstance(message, m.PublishWeights):
                self.messages.put_nowait(m.MembershipChanged(reason="joined", lost=[]))

    async def run() -> FailingSender:
        service, sender = CrowdedService({"actor-1.0": 1}), FailingSender([])
        inbox = Inbox(service)
        await make_publisher(service, sender, inbox).publish(3)
        assert isinstance(await inbox.next(DEADLINE_S), m.MembershipChanged)  # served later
        return sender

    assert len(asyncio.run(run()).offers) == 1 + MAX_FURTHER_BROADCASTS


def test_missing_actors_are_excluded_from_the_next_broadcast() -> None:
    service = Service({"actor-1.0": 1, "actor-2.0": 1, "actor-3.0": 1})
    sender = FailingSender([[2], [2]])
    publish(service, sender)
    assert [message.missing for message in service.published] == [["actor-2.0"], ["actor-3.0"], []]
    assert [offer.world_size for offer in sender.offers] == [4, 3, 2]
    assert service.published[-1].error == ""
    assert service.published[-1].num_bytes == 8
    assert "rank 2 is actor-2.0" in service.published[0].error


def test_ranks_of_one_engine_map_to_one_actor() -> None:
    service = Service({"actor-1.0": 1, "actor-2.0": 3, "actor-3.0": 1})
    publish(service, sender := FailingSender([[2, 4]]))
    assert service.published[0].missing == ["actor-2.0"]
    assert [offer.world_size for offer in sender.offers] == [6, 3]


def test_publishing_without_actors_sends_nothing() -> None:
    service = Service({"actor-1.0": 1})
    publish(service, sender := FailingSender([[1]]))
    assert len(sender.offers) == 1
    assert service.published[-1].error == ""


def test_repeated_unexplained_failures_raise() -> None:
    service = Service({"actor-1.0": 1})
    sender = FailingSender([[], [], [], []])
    with pytest.raises(WeightSyncError, match=r"without a known faulty actor.*manifest failed"):
        publish(service, sender)
    assert len(sender.offers) == MAX_UNEXPLAINED_FAILURES == 3
