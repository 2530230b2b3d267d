"""What only real sockets can do: be late, restart, die with their process, find a port taken."""

import asyncio
import signal
import socket
import subprocess
import sys

import pytest
import uvloop
from transport_contract import SOON_S, ZmqStage, over_sockets, say

from speed_async.errors import ConfigError, DeadlineExceeded, ProtocolError
from speed_async.transport.codec import encode
from speed_async.transport.messages import Drain, Rejected, WantWork
from speed_async.transport.session import Ack, Ping, SessionLink
from speed_async.transport.sockets import LINGER_S
from speed_async.transport.zeromq import open_hub, open_link
from speed_async.types import ActorCounts

HOST = "127.0.0.1"


def want(num_prompts: int) -> WantWork:
    return WantWork(counts=ActorCounts(), num_prompts=num_prompts)


async def free_port() -> int:
    hub = await open_hub(HOST, 0)
    await hub.close()
    return hub.port


def test_a_link_may_be_opened_before_its_hub():
    async def play() -> None:
        port = await free_port()
        link = await open_link(HOST, port, "early-1.0")
        for number in range(10):
            await link.send(want(number))
        with pytest.raises(DeadlineExceeded):
            await link.receive(0.05)
        hub = await open_hub(HOST, port)
        received = [await hub.receive(SOON_S) for _ in range(10)]
        assert received == [("early-1.0", want(number)) for number in range(10)]
        await say(hub, "early-1.0", Ping(sent=1))
        assert await link.receive(SOON_S) == Ping(sent=1)
        await link.close()
        await hub.close()

    asyncio.run(play())


def test_a_link_finds_a_restarted_hub_by_itself():
    async def play() -> None:
        first = await open_hub(HOST, 0)
        link = await open_link(HOST, first.port, "actor-1.0")
        await link.send(want(1))
        assert await first.receive(SOON_S) == ("actor-1.0", want(1))
        await first.close()
        second = await open_hub(HOST, first.port)
        await link.send(want(2))
        assert await second.receive(SOON_S) == ("actor-1.0", want(2))
        await say(second, "actor-1.0", Ping(sent=2))
        assert await link.receive(SOON_S) == Ping(sent=2)
        await link.close()
        await second.close()

    uvloop.run(play())


def test_a_restarted_hub_reaches_a_peer_that_has_nothing_to_say():
    async def play() -> None:
        first = await open_hub(HOST, 0)
        link = SessionLink(await open_link(HOST, first.port, "learner"))
        await link.send(want(1))
        peer, message = await first.receive(SOON_S)
        await say(first, peer, Ack(heard=message.number))
        with pytest.raises(DeadlineExceeded):
            await link.receive(0.2)
        assert link.num_unacked == 0
        await first.close()
        second = await open_hub(HOST, first.port)
        waiting = asyncio.create_task(link.receive(SOON_S))
        assert await second.receive(SOON_S) == ("learner", Ack())
        await say(second, "learner", Drain(number=1, reason="the end"))
        assert await waiting == Drain(number=1, reason="the end")
        await link.close()
        await second.close()

    uvloop.run(play())


CHILD = """
import asyncio, sys
from speed_async.transport.session import Ping
from speed_async.transport.zeromq import open_link

async def play():
    link = await open_link("127.0.0.1", int(sys.argv[1]), "child-1.0")
    await link.send(Ping(sent=1))
    await link.receive(60.0)

asyncio.run(play())
"""


@over_sockets()
async def test_a_killed_process_is_a_gone_peer_and_its_successor_is_served(stage: ZmqStage):
    stays = await stage.link("stays-1.0")
    for incarnation in (1, 2):
        child = subprocess.Popen(  # noqa: ASYNC220 (starting it is quick)
            [sys.executable, "-c", CHILD, str(stage.hub.port)]
        )
        try:
            assert await stage.hub.receive(SOON_S) == ("child-1.0", Ping(sent=1))
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(SOON_S)
        async with asyncio.timeout(SOON_S):
            while stage.hub.undelivered < incarnation:
                await say(stage.hub, "child-1.0", Ping(sent=0))
                await asyncio.sleep(0)
    await stays.send(want(7))
    assert await stage.hub.receive(SOON_S) == ("stays-1.0", want(7))


@over_sockets()
async def test_a_peer_with_an_unfit_name_is_refused(stage: ZmqStage):
    peer = await stage.raw_peer("not a name\xff")
    await peer.send_frames(encode(Ping(sent=1)))
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.2 s for any peer"):
        await stage.hub.receive(0.2)
    answer = await peer.receive(SOON_S)
    assert isinstance(answer, Rejected)
    assert "is not a valid peer name" in answer.reason
    assert stage.hub.rejected == 1
    with pytest.raises(ProtocolError, match="is not a valid peer name"):
        await stage.link("")


def test_a_port_in_use_is_a_config_error_with_a_remedy():
    async def play() -> None:
        with socket.create_server((HOST, 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match="choose another port, or 0") as refused:
                await open_hub(HOST, port)
        assert refused.value.field == "cluster.service_port"
        assert refused.value.value == port

    asyncio.run(play())


@pytest.mark.parametrize(
    ("host", "port", "field"),
    [
        (HOST, 65536, "cluster.service_port"),
        ("203.0.113.7", 0, "cluster.host"),
        ("no-such-host.invalid", 0, "cluster.host"),
    ],
)
def test_an_address_that_cannot_be_bound_is_a_config_error(host, port, field):
    with pytest.raises(ConfigError) as refused:
        asyncio.run(open_hub(host, port))
    assert refused.value.field == field


def test_hosts_may_be_names():
    async def play() -> None:
        hub = await open_hub("localhost", 0)
        link = await open_link("localhost", hub.port, "actor-1.0")
        await link.send(want(1))
        assert await hub.receive(SOON_S) == ("actor-1.0", want(1))
        await link.close()
        await hub.close()

    asyncio.run(play())


def test_closing_a_link_whose_hub_never_came_ends_after_the_linger_time():
    async def play() -> None:
        link = await open_link(HOST, await free_port(), "actor-1.0")
        await link.send(want(1))
        async with asyncio.timeout(LINGER_S + SOON_S):
            await link.close()

    asyncio.run(play())
