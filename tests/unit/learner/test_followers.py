"""The lead's side of several learner ranks, with followers that are peers of an in-process hub."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from speed_async.learner.parallel.followers import Followers, follower_name
from speed_async.testing.inprocess_transport import InProcessHub
from speed_async.transport.following import MeasureCanary, ShardWritten, TrainGroups

SIZE = 3


def with_followers(
    act: Callable[[Followers, list[Any]], Awaitable[None]],
) -> None:
    """Runs `act` with a lead and the links of its followers."""

    async def run() -> None:
        hub = InProcessHub()
        links = [hub.connect(follower_name(rank)) for rank in range(1, SIZE)]
        store = cast(Any, None)
        followers = Followers(hub, store, size=SIZE, silence_s=60.0, timeout_s=60.0)
        watching = asyncio.create_task(followers.watch())
        await act(followers, links)
        watching.cancel()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_replies_of_another_write_do_not_count() -> None:
    async def act(followers: Followers, links: list[Any]) -> None:
        for link in links:
            await link.send(ShardWritten(folder="old", error=""))
        written = asyncio.create_task(asyncio.to_thread(followers.written, Path("new")))
        await links[0].send(ShardWritten(folder="new", error=""))
        await asyncio.sleep(0.3)
        assert not written.done()
        await links[1].send(ShardWritten(folder="new", error="OSError: disk full"))
        assert await written == ["learner-2: OSError: disk full"]

    with_followers(act)


def test_waiting_for_a_write_ends_when_the_lead_closes() -> None:
    async def act(followers: Followers, links: list[Any]) -> None:
        written = asyncio.create_task(asyncio.to_thread(followers.written, Path("new")))
        await followers.close()
        with pytest.raises(OSError, match="a learner rank was lost"):
            await written

    with_followers(act)


def test_messages_of_two_threads_do_not_mix() -> None:
    async def act(followers: Followers, links: list[Any]) -> None:
        batch = [TrainGroups(num_groups=number) for number in range(50)]
        await asyncio.gather(
            asyncio.to_thread(followers.command, *batch),
            asyncio.to_thread(followers.command, MeasureCanary()),
        )
        kinds = [type(await links[0].receive(10.0)) for _ in range(51)]
        first = kinds.index(TrainGroups)
        assert kinds[first : first + 50] == [TrainGroups] * 50

    with_followers(act)
