"""Ownership of peer names: over real sockets, and in the table of names."""

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop
import zmq

from speed_async.errors import DeadlineExceeded, ProtocolError
from speed_async.transport import peer_names
from speed_async.transport.codec import encode
from speed_async.transport.curve import ClientKeys, load_client_keys, load_server_keys
from speed_async.transport.key_making import add_client, make_keys
from speed_async.transport.messages import Rejected, Welcome
from speed_async.transport.peer_names import MAX_NAMES_PER_KEY, PeerNames, new_identity
from speed_async.transport.session import Ack, Ping
from speed_async.transport.transport import Delivery, Link
from speed_async.transport.zeromq import ZmqHub, open_hub, open_link
from tests.fakes.transport_contract import SOON_S, ZmqSetup, offer_until_queued, over_sockets

HOST = "127.0.0.1"
NAME = "actor-1.0"


async def assert_served(hub: ZmqHub, link: Link, number: int) -> None:
    """Assert that messages pass in both directions under NAME."""
    await link.send(Ping(sent=number))
    assert await hub.receive(SOON_S) == (NAME, Ping(sent=number))
    assert await offer_until_queued(hub, NAME, Welcome(policy_version=number)) is Delivery.QUEUED
    assert await next_message(link) == Welcome(policy_version=number)


async def next_message(link: Link):
    """The next message that is not an Ack."""
    while True:
        message = await link.receive(SOON_S)
        if type(message).__name__ != "Ack":
            return message


async def assert_refused(hub: ZmqHub, link: Link, reason: str) -> None:
    """Assert that the peer receives the reason, is counted and blocked, and that the hub receives
    none of its messages."""
    before = hub.rejected, hub.muted.num_blocked
    for number in range(3):
        await link.send(Ping(sent=66 + number))
    with pytest.raises(DeadlineExceeded):
        await hub.receive(0.3)
    reply = await link.receive(SOON_S)
    assert isinstance(reply, Rejected)
    assert reason in reply.reason
    assert (hub.rejected, hub.muted.num_blocked) == (before[0] + 1, before[1] + 1)
    assert hub.newly_rejected == []  # not attributed to the owner


async def wait_until_received(hub: ZmqHub, link: Link) -> None:
    """Send until a message arrives. Messages sent while the connection breaks may be lost."""
    async with asyncio.timeout(SOON_S):
        while True:
            await link.send(Ack())
            with suppress(DeadlineExceeded):
                assert (await hub.receive(0.1))[0] == NAME
                break
    with suppress(DeadlineExceeded):
        while True:
            await hub.receive(0.1)


async def wait_until_gone(hub: ZmqHub) -> None:
    async with asyncio.timeout(SOON_S):
        while await offer_until_queued(hub, NAME, Welcome(policy_version=0)) is not Delivery.GONE:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@over_sockets()
async def test_second_link_under_a_name_in_use_is_rejected_and_the_first_still_works(
    stage: ZmqSetup,
):
    owner = await stage.link(NAME)
    await assert_served(stage.hub, owner, 1)
    for _ in range(3):
        await assert_refused(stage.hub, await stage.link(NAME), "another connection, which is open")
    await assert_served(stage.hub, owner, 2)


@over_sockets()
async def test_malformed_frames_under_the_name_of_another_peer_are_not_attributed_to_it(
    stage: ZmqSetup,
):
    owner = await stage.link(NAME)
    await assert_served(stage.hub, owner, 1)
    intruder = await stage.raw_peer(NAME)
    await intruder.send_frames([b"malformed"])
    with pytest.raises(DeadlineExceeded):
        await stage.hub.receive(0.3)
    assert (stage.hub.rejected, stage.hub.newly_rejected) == (1, [])
    await assert_served(stage.hub, owner, 2)


@over_sockets()
async def test_bare_name_is_not_a_valid_identity(stage: ZmqSetup):
    context: zmq.Context = zmq.Context()
    try:
        peer = context.socket(zmq.DEALER)
        peer.IDENTITY = NAME.encode()
        peer.connect(f"tcp://{HOST}:{stage.hub.port}")
        peer.send_multipart(encode(Ping(sent=1)))
        with pytest.raises(DeadlineExceeded):
            await stage.hub.receive(0.3)
        assert stage.hub.rejected == 1
    finally:
        context.destroy(linger=0)


def test_name_belongs_to_the_key_that_opened_it(tmp_path: Path):
    """Another allowed key cannot use the name, even while its owner is disconnected. The same key
    can, but only then."""
    make_keys(tmp_path / "keys")
    server, own = load_server_keys(tmp_path / "keys"), load_client_keys(tmp_path / "keys")
    other = load_client_keys(add_client(tmp_path / "keys", "other"))
    assert own.public != other.public

    async def scenario() -> None:
        hub = await open_hub(HOST, 0, keys=server)
        links: list[Link] = []

        async def link(keys: ClientKeys, name: str = NAME) -> Link:
            links.append(await open_link(HOST, hub.port, name, keys=keys))
            return links[-1]

        try:
            owner = await link(own)
            await assert_served(hub, owner, 1)
            assert hub.key_of(NAME) == own.public.decode()
            await assert_refused(hub, await link(other), "belongs to another key")
            await assert_refused(hub, await link(own), "another connection, which is open")
            await assert_served(hub, owner, 2)
            second = await link(own, "actor-2.0")  # one key may own many names
            await second.send(Ping(sent=5))
            assert await hub.receive(SOON_S) == ("actor-2.0", Ping(sent=5))
            await owner.close()
            await wait_until_gone(hub)
            await assert_refused(hub, await link(other), "belongs to another key")
            await assert_served(hub, await link(own), 3)
        finally:
            for each in links:
                await each.close()
            await hub.close()

    uvloop.run(asyncio.wait_for(scenario(), 6 * SOON_S))


def test_owner_keeps_its_name_when_it_reconnects(tmp_path: Path):
    """It reconnects through a relay that aborts its connection. The name stays reserved and none
    of its messages is rejected."""
    make_keys(tmp_path / "keys")
    server, own = load_server_keys(tmp_path / "keys"), load_client_keys(tmp_path / "keys")

    async def scenario() -> None:
        hub = await open_hub(HOST, 0, keys=server)
        writers: list[asyncio.StreamWriter] = []

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(HOST, hub.port)
            writers.extend([writer, far_writer])

            async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                while data := await source.read(65536):
                    sink.write(data)

            await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

        relaying = await asyncio.start_server(relay, HOST, 0)
        link = await open_link(HOST, relaying.sockets[0].getsockname()[1], NAME, keys=own)
        try:
            for number in range(1, 4):
                await wait_until_received(hub, link)
                await assert_served(hub, link, number)
                while writers:
                    writers.pop().transport.abort()
            await wait_until_received(hub, link)
            assert hub.rejected == 0
        finally:
            await link.close()
            relaying.close()
            await hub.close()

    uvloop.run(asyncio.wait_for(scenario(), 6 * SOON_S))


# --- the table ---------------------------------------------------------------------------------


def test_names_of_one_key_never_evict_those_of_another():
    names = PeerNames(lambda identity: True)
    first = new_identity(NAME)
    assert names.claim(first, "a") == NAME
    for number in range(3 * MAX_NAMES_PER_KEY):
        names.claim(new_identity(f"join-{number}"), "b")
    assert len(names) == MAX_NAMES_PER_KEY + 1
    assert names.name(first) == NAME
    with pytest.raises(ProtocolError, match="belongs to another key"):
        names.claim(new_identity(NAME), "b")


def test_names_in_use_are_kept_when_a_key_opens_too_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peer_names, "MAX_NAMES_PER_KEY", 4)
    names = PeerNames(lambda identity: True)
    used = new_identity(NAME)
    names.claim(used, "")
    for number in range(20):
        assert names.name(used) == NAME
        names.claim(new_identity(f"join-{number}"), "")
    assert len(names) == 4
    assert names.name(used) == NAME


def test_identities_of_one_name_are_unique():
    assert len({new_identity(NAME) for _ in range(100)}) == 100
    with pytest.raises(ProtocolError, match="is not a valid peer name"):
        new_identity("no name")
