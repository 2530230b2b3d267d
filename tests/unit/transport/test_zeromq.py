"""Behaviour of real sockets: late starts, restarts, killed processes, ports in use."""

import asyncio
import signal
import socket
import subprocess
import sys

import pytest
import uvloop

from speed_async.errors import ConfigError, DeadlineExceeded, ProtocolError
from speed_async.transport.codec import encode
from speed_async.transport.messages import Drain, Rejected, WantWork
from speed_async.transport.session import Ack, Ping, SessionLink
from speed_async.transport.sockets import LINGER_S
from speed_async.transport.zeromq import open_hub, open_link
from speed_async.types import ActorCounts
from tests.fakes.transport_contract import SOON_S, ZmqSetup, offer_until_queued, over_sockets

HOST = "127.0.0.1"


def want_work(num_prompts: int) -> WantWork:
    return WantWork(counts=ActorCounts(), num_prompts=num_prompts)


async def free_port() -> int:
    hub = await open_hub(HOST, 0)
    await hub.close()
    return hub.port


def test_link_can_be_opened_before_its_hub():
    async def run_test() -> None:
        port = await free_port()
        link = await open_link(HOST, port, "early-1.0")
        for number in range(10):
            await link.send(want_work(number))
        with pytest.raises(DeadlineExceeded):
            await link.receive(0.05)
        hub = await open_hub(HOST, port)
        received = [await hub.receive(SOON_S) for _ in range(10)]
        assert received == [("early-1.0", want_work(number)) for number in range(10)]
        await offer_until_queued(hub, "early-1.0", Ping(sent=1))
        assert await link.receive(SOON_S) == Ping(sent=1)
        await link.close()
        await hub.close()

    asyncio.run(run_test())


def test_link_reconnects_to_a_restarted_hub():
    async def run_test() -> None:
        first = await open_hub(HOST, 0)
        link = await open_link(HOST, first.port, "actor-1.0")
        await link.send(want_work(1))
        assert await first.receive(SOON_S) == ("actor-1.0", want_work(1))
        await first.close()
        second = await open_hub(HOST, first.port)
        await link.send(want_work(2))
        assert await second.receive(SOON_S) == ("actor-1.0", want_work(2))
        await offer_until_queued(second, "actor-1.0", Ping(sent=2))
        assert await link.receive(SOON_S) == Ping(sent=2)
        await link.close()
        await second.close()

    uvloop.run(run_test())


def test_link_gives_up_a_connection_that_never_completes_its_handshake():
    """A service that dies while a peer connects leaves such a connection."""

    async def run_test():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            link = await open_link("127.0.0.1", port, "actor-1.0")
            silent, _ = await asyncio.to_thread(listener.accept)
        hub = await open_hub("127.0.0.1", port)
        started_s = asyncio.get_running_loop().time()
        try:
            await link.send(want_work(1))
            assert await hub.receive(60.0) == ("actor-1.0", want_work(1))
            assert asyncio.get_running_loop().time() - started_s < 25.0  # ZeroMQ's default is 30
        finally:
            silent.close()
            await link.close()
            await hub.close()

    uvloop.run(run_test())


def test_restarted_hub_reaches_an_idle_peer():
    async def run_test() -> None:
        first = await open_hub(HOST, 0)
        link = SessionLink(await open_link(HOST, first.port, "learner"))
        await link.send(want_work(1))
        peer, message = await first.receive(SOON_S)
        await offer_until_queued(first, peer, Ack(received=message.number))
        with pytest.raises(DeadlineExceeded):
            await link.receive(0.2)
        assert link.num_unacked == 0
        await first.close()
        second = await open_hub(HOST, first.port)
        waiting = asyncio.create_task(link.receive(SOON_S))
        assert await second.receive(SOON_S) == ("learner", Ack())
        await offer_until_queued(second, "learner", Drain(number=1, reason="the end"))
        assert await waiting == Drain(number=1, reason="the end")
        await link.close()
        await second.close()

    uvloop.run(run_test())


CHILD = """
import asyncio, sys
from speed_async.transport.session import Ping
from speed_async.transport.zeromq import open_link

async def run_test():
    link = await open_link("127.0.0.1", int(sys.argv[1]), "child-1.0")
    await link.send(Ping(sent=1))
    await link.receive(60.0)

asyncio.run(run_test())
"""


@over_sockets()
async def test_killed_peer_is_detected_and_its_successor_is_served(setup: ZmqSetup):
    stays = await setup.link("stays-1.0")
    for incarnation in (1, 2):
        child = subprocess.Popen(  # noqa: ASYNC220 (starting it is fast)
            [sys.executable, "-c", CHILD, str(setup.hub.port)]
        )
        try:
            assert await setup.hub.receive(SOON_S) == ("child-1.0", Ping(sent=1))
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(SOON_S)
        async with asyncio.timeout(SOON_S):
            while setup.hub.undelivered < incarnation:
                await offer_until_queued(setup.hub, "child-1.0", Ping(sent=0))
                await asyncio.sleep(0)
    await stays.send(want_work(7))
    assert await setup.hub.receive(SOON_S) == ("stays-1.0", want_work(7))


@over_sockets()
async def test_peer_with_an_invalid_name_is_rejected(setup: ZmqSetup):
    peer = await setup.raw_peer("not a name\xff")
    await peer.send_frames(encode(Ping(sent=1)))
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.2 s for any peer"):
        await setup.hub.receive(0.2)
    answer = await peer.receive(SOON_S)
    assert isinstance(answer, Rejected)
    assert "is not a valid peer name" in answer.reason
    assert setup.hub.rejected == 1
    with pytest.raises(ProtocolError, match="is not a valid peer name"):
        await setup.link("")


def test_a_port_in_use_is_a_config_error_with_a_remedy():
    async def run_test() -> None:
        with socket.create_server((HOST, 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match="choose another port, or 0") as refused:
                await open_hub(HOST, port)
            with pytest.raises(ConfigError, match=r"cluster\.learner_port"):
                await open_hub(HOST, port, field="cluster.learner_port")
        assert refused.value.field == "cluster.service_port"
        assert refused.value.value == port

    asyncio.run(run_test())


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


def test_hosts_can_be_names():
    async def run_test() -> None:
        hub = await open_hub("localhost", 0)
        link = await open_link("localhost", hub.port, "actor-1.0")
        await link.send(want_work(1))
        assert await hub.receive(SOON_S) == ("actor-1.0", want_work(1))
        await link.close()
        await hub.close()

    asyncio.run(run_test())


def test_close_without_a_hub_ends_after_the_linger_time():
    async def run_test() -> None:
        link = await open_link(HOST, await free_port(), "actor-1.0")
        await link.send(want_work(1))
        async with asyncio.timeout(LINGER_S + SOON_S):
            await link.close()

    asyncio.run(run_test())
