"""Transport contract: the same tests run in process and over real sockets."""

import asyncio
import functools
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Protocol

import pytest
import uvloop
import zmq
import zmq.asyncio

from speed_async.testing.inprocess_transport import InProcessHub, InProcessLink
from speed_async.transport.codec import Frame, decode
from speed_async.transport.messages import Message
from speed_async.transport.muting import BlockedPeers
from speed_async.transport.transport import Delivery, Hub, Link
from speed_async.transport.zeromq import ZmqHub, open_hub, open_link

TEST_DEADLINE_S = 90.0
SOON_S = 10.0
"""Deadline of waits that a correct transport ends immediately."""


class CountingHub(Hub, Protocol):
    rejected: int
    newly_rejected: list[str]
    undelivered: int
    muted: BlockedPeers


async def offer_until_queued(hub: Hub, peer: str, message: Message) -> Delivery:
    """Offer a message until it is queued or the peer is gone."""
    async with asyncio.timeout(SOON_S):
        while (delivery := hub.offer(peer, message)) is Delivery.FULL:  # noqa: ASYNC110
            await asyncio.sleep(0.001)  # a hub does not signal free queue space
    return delivery


class RawPeer(Protocol):
    """A peer that can send arbitrary frames."""

    async def send_frames(self, frames: Sequence[Frame]) -> None: ...

    async def receive(self, deadline_s: float) -> Message: ...


class TransportSetup(Protocol):
    """A hub and a way to connect to it; everything is closed at the end of the test."""

    hub: CountingHub

    async def link(self, name: str) -> Link: ...

    async def raw_peer(self, name: str) -> RawPeer: ...


class InProcessSetup:
    def __init__(self, queued_messages: int, send_deadline_s: float) -> None:
        self.hub = InProcessHub(queued_messages=queued_messages, send_deadline_s=send_deadline_s)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "InProcessSetup":
        self._stack.push_async_callback(self.hub.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def link(self, name: str) -> InProcessLink:
        link = self.hub.connect(name)
        self._stack.push_async_callback(link.close)
        return link

    async def raw_peer(self, name: str) -> InProcessLink:
        return await self.link(name)


class ZmqSetup:
    hub: ZmqHub

    def __init__(self, queued_messages: int, send_deadline_s: float) -> None:
        self._queued_messages = queued_messages
        self._send_deadline_s = send_deadline_s
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "ZmqSetup":
        self.hub = await open_hub(
            "127.0.0.1",
            0,
            outbox_messages=self._queued_messages,
            inbox_messages=self._queued_messages,
        )
        self._stack.push_async_callback(self.hub.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def link(self, name: str) -> Link:
        link = await open_link(
            "127.0.0.1",
            self.hub.port,
            name,
            outbox_messages=self._queued_messages,
            inbox_messages=self._queued_messages,
            send_deadline_s=self._send_deadline_s,
        )
        self._stack.push_async_callback(link.close)
        return link

    async def raw_peer(self, name: str) -> "ZmqRawPeer":
        peer = ZmqRawPeer(name, self.hub.port)
        self._stack.callback(peer.close)
        return peer


class ZmqRawPeer:
    def __init__(self, name: str, port: int) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.IDENTITY = f"{name}/{secrets.token_hex(16)}".encode("latin-1")
        self._socket.connect(f"tcp://127.0.0.1:{port}")

    async def send_frames(self, frames: Sequence[Frame]) -> None:
        await self._socket.send_multipart(frames)

    async def receive(self, deadline_s: float) -> Message:
        async with asyncio.timeout(deadline_s):
            return decode(await self._socket.recv_multipart())

    def close(self) -> None:
        self._context.destroy(linger=0)


AsyncTest = Callable[..., Awaitable[None]]
RUNNERS = {"asyncio": asyncio.run, "uvloop": uvloop.run}
SETTINGS = {
    "in-process": (InProcessSetup, "asyncio"),
    "zeromq-asyncio": (ZmqSetup, "asyncio"),
    "zeromq-uvloop": (ZmqSetup, "uvloop"),
}


def on_every_transport(
    *, queued_messages: int = 64, send_deadline_s: float = SOON_S
) -> Callable[[AsyncTest], Callable[..., None]]:
    """Run an async test on each transport and event loop, within a deadline."""
    return _parametrized(list(SETTINGS), queued_messages, send_deadline_s)


def over_sockets(
    *, queued_messages: int = 64, send_deadline_s: float = SOON_S
) -> Callable[[AsyncTest], Callable[..., None]]:
    """Like `on_every_transport`, for tests that need sockets: restarts, kills, late starts."""
    zmq_settings = [name for name, (setup_type, _) in SETTINGS.items() if setup_type is ZmqSetup]
    return _parametrized(zmq_settings, queued_messages, send_deadline_s)


def _parametrized(
    names: list[str], queued_messages: int, send_deadline_s: float
) -> Callable[[AsyncTest], Callable[..., None]]:
    def decorate(test: AsyncTest) -> Callable[..., None]:
        @pytest.mark.parametrize("setting", names)
        def run(setting: str) -> None:
            setup_type, loop = SETTINGS[setting]

            async def run_with_setup() -> None:
                async with (
                    asyncio.timeout(TEST_DEADLINE_S),
                    setup_type(queued_messages, send_deadline_s) as setup,
                ):
                    await test(setup)

            RUNNERS[loop](run_with_setup())

        # Without `__wrapped__`, or pytest would look for a fixture for the test's parameter.
        functools.update_wrapper(run, test)
        vars(run).pop("__wrapped__")
        return run

    return decorate
