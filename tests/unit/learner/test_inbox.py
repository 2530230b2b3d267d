"""Several tasks wait for messages of the service at the same time."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from speed_async.errors import RoleError, WeightSyncError
from speed_async.learner.inbox import Inbox, Stop
from speed_async.testing.inprocess_transport import InProcessHub
from speed_async.transport import messages as m

DEADLINE_S = 20.0
MEMBERS = m.WeightMembers(policy_version=1, epoch=1, actor_names=[], ranks_each=[], world_size=1)
BATCH = m.BatchReady(policy_version=1, lease_ids=[])
JOINED = m.MembershipChanged(reason="actor-2.0 joined", lost=[])
Scenario = Callable[[Inbox, Callable[[m.Message], Awaitable[None]]], Coroutine[Any, Any, None]]


def play(scenario: Scenario) -> None:
    """Runs a scenario with an inbox and a function that sends it a message of the service."""

    async def run() -> None:
        hub = InProcessHub()
        inbox = Inbox(hub.connect("learner"))

        async def send(message: m.Message) -> None:
            hub.offer("learner", message)
            for _ in range(20):  # all tasks take their turns
                await asyncio.sleep(0)

        async with asyncio.timeout(DEADLINE_S):
            await scenario(inbox, send)

    asyncio.run(run())


def expect_members(inbox: Inbox) -> asyncio.Task[m.WeightMembers]:
    return asyncio.create_task(inbox.expect(m.WeightMembers, DEADLINE_S, "the members"))


@pytest.mark.parametrize("first", ["expect", "next"])
@pytest.mark.parametrize("messages", [(MEMBERS, BATCH), (BATCH, MEMBERS)])
def test_each_task_gets_its_message_without_a_further_one(
    first: str, messages: tuple[m.Message, m.Message]
) -> None:
    """Whichever task receives, and in whatever order the messages arrive."""

    async def scenario(inbox: Inbox, send: Callable[[m.Message], Awaitable[None]]) -> None:
        tasks: dict[str, asyncio.Task[Any]] = {}
        for kind in ("expect", "next") if first == "expect" else ("next", "expect"):
            if kind == "expect":
                tasks[kind] = expect_members(inbox)
            else:
                tasks[kind] = asyncio.create_task(inbox.next(DEADLINE_S))
            await asyncio.sleep(0)
        for message in messages:
            await send(message)
            assert tasks["expect" if message is MEMBERS else "next"].done()
        assert (await tasks["expect"], await tasks["next"]) == (MEMBERS, BATCH)

    play(scenario)


def test_a_change_of_members_comes_before_a_batch() -> None:
    """Both were received by another task, which goes on receiving."""

    async def scenario(inbox: Inbox, send: Callable[[m.Message], Awaitable[None]]) -> None:
        receiving = asyncio.create_task(inbox.receive_all())
        seen: list[m.Message] = []
        inbox.observers.add(seen.append)
        await send(BATCH)
        await send(JOINED)
        assert [await inbox.next(DEADLINE_S), await inbox.next(DEADLINE_S)] == [JOINED, BATCH]
        assert seen == [BATCH, JOINED]
        receiving.cancel()

    play(scenario)


def test_a_failure_of_a_role_reaches_a_task_that_waits() -> None:
    async def scenario(inbox: Inbox, send: Callable[[m.Message], Awaitable[None]]) -> None:
        expecting = expect_members(inbox)
        waiting = asyncio.create_task(inbox.next_or_stop(Stop(), DEADLINE_S, expecting))
        await send(m.Abort(role="actor-1.0", message="out of memory"))
        with pytest.raises(RoleError, match="out of memory"):
            await waiting
        expecting.cancel()

    play(scenario)


def test_the_error_of_a_task_beside_ends_the_wait_for_a_message() -> None:
    async def fail() -> None:
        raise WeightSyncError("no members")

    async def scenario(inbox: Inbox, send: Callable[[m.Message], Awaitable[None]]) -> None:
        with pytest.raises(WeightSyncError, match="no members"):
            await inbox.next_or_stop(Stop(), DEADLINE_S, asyncio.create_task(fail()))
        await send(BATCH)
        assert await inbox.next(DEADLINE_S) == BATCH

    play(scenario)


def test_a_stop_ends_the_wait_and_loses_no_message() -> None:
    async def scenario(inbox: Inbox, send: Callable[[m.Message], Awaitable[None]]) -> None:
        stop = Stop()
        waiting = asyncio.create_task(inbox.next_or_stop(stop, DEADLINE_S))
        await asyncio.sleep(0)
        stop.set()
        assert await waiting is None
        await send(BATCH)
        assert await inbox.next(DEADLINE_S) == BATCH

    play(scenario)
