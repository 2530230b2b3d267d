"""Several tasks wait for messages of the service at the same time."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from speed_async.errors import DeadlineExceeded, RoleError, WeightSyncError
from speed_async.learner.inbox import Inbox, Stop
from speed_async.testing.inprocess_transport import InProcessHub
from speed_async.transport import messages as m

DEADLINE_S = 20.0
MEMBERS = m.WeightMembers(policy_version=1, epoch=1, actor_names=[], ranks_each=[], world_size=1)
DURABLE = m.JournalDurable(policy_version=1, service_sequence=1)
BATCH = m.BatchReady(policy_version=1, lease_ids=[])
JOINED = m.MembershipChanged(reason="actor-2.0 joined", lost=[])
Scenario = Callable[[Inbox, Callable[..., Awaitable[None]]], Coroutine[Any, Any, None]]


def play(scenario: Scenario) -> None:
    """Runs a scenario with an inbox and a function that sends it messages of the service."""

    async def run() -> None:
        hub = InProcessHub()
        inbox = Inbox(hub.connect("learner"))

        async def send(*messages: m.Message) -> None:
            for message in messages:
                hub.offer("learner", message)
            for _ in range(20):  # all tasks take their turns
                await asyncio.sleep(0)

        async with asyncio.timeout(DEADLINE_S):
            await scenario(inbox, send)
        await inbox.close()

    asyncio.run(run())


@pytest.mark.parametrize("messages", [(MEMBERS, BATCH, DURABLE), (DURABLE, BATCH, MEMBERS)])
@pytest.mark.parametrize("arrive_together", [True, False])
def test_each_task_gets_its_message_without_a_further_one(
    messages: tuple[m.Message, ...], arrive_together: bool
) -> None:
    async def scenario(inbox: Inbox, send: Callable[..., Awaitable[None]]) -> None:
        waits = (
            (MEMBERS, inbox.expect(m.WeightMembers, DEADLINE_S, "members")),
            (BATCH, inbox.next(DEADLINE_S)),
            (DURABLE, inbox.expect(m.JournalDurable, DEADLINE_S, "a journal")),
        )
        tasks = [(message, asyncio.create_task(wait)) for message, wait in waits]
        await asyncio.sleep(0)
        for part in [messages] if arrive_together else [(each,) for each in messages]:
            await send(*part)
            assert all(task.done() for message, task in tasks if message in part)
        for message, task in tasks:
            assert await task == message

    play(scenario)


def test_a_reply_is_left_for_the_task_that_expects_it_later() -> None:
    async def scenario(inbox: Inbox, send: Callable[..., Awaitable[None]]) -> None:
        waiting = asyncio.create_task(inbox.next(DEADLINE_S))
        await send(MEMBERS, BATCH)
        assert await waiting == BATCH
        assert await inbox.expect(m.WeightMembers, DEADLINE_S, "members") == MEMBERS

    play(scenario)


def test_a_change_of_members_comes_before_a_batch() -> None:
    async def scenario(inbox: Inbox, send: Callable[..., Awaitable[None]]) -> None:
        seen: list[m.Message] = []
        inbox.observers.append(seen.append)
        expecting = asyncio.create_task(inbox.expect(m.WeightMembers, DEADLINE_S, "members"))
        await send(BATCH, JOINED, MEMBERS)
        assert [await inbox.next(DEADLINE_S), await inbox.next(DEADLINE_S)] == [JOINED, BATCH]
        assert await expecting == MEMBERS
        assert seen == [BATCH, JOINED, MEMBERS]

    play(scenario)


def test_received_messages_of_a_class_can_be_taken_out_of_turn() -> None:
    async def scenario(inbox: Inbox, send: Callable[..., Awaitable[None]]) -> None:
        waiting = asyncio.create_task(inbox.next(DEADLINE_S))
        await send(BATCH, BATCH)
        await waiting
        await send(JOINED)
        assert inbox.take_received(m.MembershipChanged) == [JOINED]
        assert inbox.take_received(m.MembershipChanged) == []
        assert await inbox.next(DEADLINE_S) == BATCH

    play(scenario)


def test_a_failure_of_a_role_reaches_every_task_that_waits_and_later_ones() -> None:
    async def scenario(inbox: Inbox, send: Callable[..., Awaitable[None]]) -> None:
        tasks = [
            asyncio.create_task(inbox.expect(m.WeightMembers, DEADLINE_S, "members")),
            asyncio.create_task(inbox.next_or_stop(Stop(), DEADLINE_S)),
        ]
        await asyncio.sleep(0)
        await send(m.Abort(role="actor-1.0", message="out of memory"))
        later = asyncio.create_task(inbox.expect(m.JournalDurable, DEADLINE_S, "a journal"))
        for task in (*tasks, later):
            with pytest.raises(RoleError, match="out of memory"):
                await task

    play(scenario)


def test_messages_before_a_failure_are_still_taken() -> None:
    async def scenario(inbox: Inbox, send: Callable[..., Awaitable[None]]) -> None:
        waiting = asyncio.create_task(inbox.next(DEADLINE_S))
        await send(BATCH, BATCH)
        inbox.fail(WeightSyncError("the network is gone"))
        assert (await waiting, await inbox.next(DEADLINE_S)) == (BATCH, BATCH)
        with pytest.raises(WeightSyncError, match="the network is gone"):
            await inbox.next(DEADLINE_S)

    play(scenario)


def test_a_wait_ends_at_its_deadline_and_names_what_is_missing() -> None:
    async def scenario(inbox: Inbox, send: Callable[..., Awaitable[None]]) -> None:
        with pytest.raises(DeadlineExceeded, match="the buffer service: its members"):
            await inbox.expect(m.WeightMembers, 0.01, "its members")

    play(scenario)


def test_a_stop_ends_the_wait_and_loses_no_message() -> None:
    async def scenario(inbox: Inbox, send: Callable[..., Awaitable[None]]) -> None:
        stop = Stop()
        waiting = asyncio.create_task(inbox.next_or_stop(stop, DEADLINE_S))
        await asyncio.sleep(0)
        stop.set()
        assert await waiting is None
        await send(BATCH)
        assert await inbox.next(DEADLINE_S) == BATCH

    play(scenario)
