"""The lead's side of several learner ranks, with followers that are peers of an in-process hub."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from speed_async.errors import DeadlineExceeded, RoleError
from speed_async.launcher.roles.follower_role import lead_verdict
from speed_async.launcher.roles.learner_work import compute_in_threads
from speed_async.learner.parallel.followers import Followers, follower_name
from speed_async.learner.parallel.following import FollowerLoop
from speed_async.testing.inprocess_transport import InProcessHub
from speed_async.transport import messages as m
from speed_async.transport.following import (
    Alive,
    Follow,
    LeadPlan,
    MeasureCanary,
    ShardWritten,
    StopFollowing,
    TrainGroups,
)

SIZE = 3
PLAN = LeadPlan(config="{}", store_host="127.0.0.1", store_port=1)


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


def make_followers(hub: InProcessHub, *, timeout_s: float = 60.0) -> Followers:
    return Followers(hub, cast(Any, None), size=SIZE, silence_s=60.0, timeout_s=timeout_s)


def test_a_follower_hears_the_lead_while_others_start() -> None:
    async def run() -> None:
        hub = InProcessHub()
        links = [hub.connect(follower_name(rank)) for rank in range(1, SIZE)]
        assembling = asyncio.create_task(make_followers(hub).assemble(PLAN, 60.0))
        await links[0].send(Follow(rank=1))
        kinds = [type(await links[0].receive(10.0)) for _ in range(3)]
        assert kinds == [LeadPlan, Alive, Alive]
        await links[1].send(Follow(rank=2))
        await assembling

    asyncio.run(asyncio.wait_for(run(), 60))


def test_followers_that_do_not_start_are_named() -> None:
    async def run() -> None:
        hub = InProcessHub()
        link = hub.connect(follower_name(1))
        await link.send(Follow(rank=1))
        with pytest.raises(DeadlineExceeded, match="learner-2: its process to start"):
            await make_followers(hub).assemble(PLAN, 0.5)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_an_operation_that_does_not_advance_ends_the_run() -> None:
    async def run() -> None:
        hub = InProcessHub()
        for rank in range(1, SIZE):
            hub.connect(follower_name(rank))
        followers = make_followers(hub, timeout_s=1.0)
        watching = asyncio.create_task(followers.watch())

        def hang(*, steps: int) -> None:
            with followers.operation(MeasureCanary()):
                for _ in range(steps):
                    time.sleep(0.4)
                    followers.advanced()
                ended.wait()

        ended = threading.Event()
        working = asyncio.create_task(asyncio.to_thread(hang, steps=5))
        await asyncio.sleep(2.0)
        assert not watching.done()  # it advanced
        with pytest.raises(RoleError, match="has not advanced for 1 s"):
            await watching
        ended.set()
        await working

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_follower_reports_why_the_lead_ended() -> None:
    """Also one whose own work failed: the loss of a rank makes operations of all others fail."""

    async def act(followers: Followers, links: list[Any]) -> None:
        loop = FollowerLoop(links[0], silence_s=60.0, stopping=asyncio.Event())
        idle = asyncio.create_task(loop.run(lambda: cast(Any, None)))
        failed = asyncio.create_task(lead_verdict(links[1]))
        await asyncio.sleep(0)
        await followers.close("learner-3: was killed")
        with pytest.raises(RoleError, match=r"^learner-3: was killed$"):
            await idle
        assert str(await failed) == "learner-3: was killed"

    with_followers(act)


def test_a_follower_hears_the_end_after_one_that_is_gone() -> None:
    async def act(followers: Followers, links: list[Any]) -> None:
        await links[0].close()
        await followers.close("learner-1: was killed")
        message = await links[1].receive(10.0)
        while isinstance(message, Alive):
            message = await links[1].receive(10.0)
        assert message == StopFollowing(error="learner-1: was killed")

    with_followers(act)


def test_a_failure_before_all_have_started_is_the_error_of_the_run() -> None:
    async def run() -> None:
        hub = InProcessHub()
        links = [hub.connect(follower_name(rank)) for rank in range(1, SIZE)]
        followers = make_followers(hub)
        assembling = asyncio.create_task(followers.assemble(PLAN, 60.0))
        await links[0].send(Follow(rank=1))
        await links[0].send(m.Failure(role="learner-1", message="learner-1: no such folder"))
        await links[1].send(Follow(rank=2))
        await assembling
        with pytest.raises(RoleError, match="learner-1: no such folder"):
            await followers.watch()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_threads_compute_on_the_gpu_of_their_process(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: dict[int, torch.device] = {}
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: devices.update({threading.get_ident(): device})
    )
    gpu = torch.device("cuda", 1)

    async def run() -> None:
        compute_in_threads(gpu)
        barrier = threading.Barrier(3)

        def work() -> torch.device:
            barrier.wait()  # so that each call has a thread of its own
            return devices[threading.get_ident()]

        assert await asyncio.gather(*(asyncio.to_thread(work) for _ in range(3))) == [gpu] * 3

    asyncio.run(run())
