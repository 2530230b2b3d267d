"""One ZeroMQ socket under asyncio: every wait has a deadline, several messages a wake-up.

Operations are tried at once and awaited only when the socket has nothing to give. libzmq signals
through an edge-triggered descriptor that any operation may consume, so each operation re-checks on
behalf of whoever waits for the other direction.

libzmq bounds the bytes of one frame (`MAXMSGSIZE`), not the number of frames of one message: of a
message that is too large only so much is kept that the codec sees it, and refuses it.
"""

import asyncio
import errno
import ipaddress
import socket as posix
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import zmq
from zmq.auth.thread import ThreadAuthenticator

from speed_async.errors import ConfigError, DeadlineExceeded, TransportClosed
from speed_async.transport.codec import MAX_FRAMES, MAX_MESSAGE_BYTES, Frame
from speed_async.transport.curve import Keys, secure

T = TypeVar("T")

HEARTBEAT_INTERVAL_S = 2.0
HEARTBEAT_TIMEOUT_S = 10.0
RECONNECT_FIRST_S = 0.05
RECONNECT_LONGEST_S = 1.0
LINGER_S = 2.0
"""How long `close` waits for what was sent to leave."""
ZERO_COPY_BYTES = 64 * 1024
"""Frames this large are handed to libzmq as they are; tracking smaller ones costs more."""
MAX_BURST = 32
"""Operations in a row without yielding to the event loop."""
_MORE = int(zmq.SNDMORE)


class PolledSocket:
    """A socket of `kind` in a context of its own; made and used in one running event loop."""

    def __init__(
        self,
        kind: int,
        *,
        outbox_messages: int,
        inbox_messages: int,
        max_frame_bytes: int = MAX_MESSAGE_BYTES,
        keys: Keys | None = None,
    ) -> None:
        """`keys`: speak CURVE, as the service (ServerKeys) or towards it (ClientKeys)."""
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context = zmq.Context(io_threads=1)
        self._socket: zmq.Socket = self._context.socket(kind)
        self._socket.SNDHWM = outbox_messages
        self._socket.RCVHWM = inbox_messages
        set_common_options(self._socket, max_frame_bytes=max_frame_bytes)
        self._authenticator = secure(self._socket, keys)
        self._readers: set[asyncio.Future[None]] = set()
        self._writers: set[asyncio.Future[None]] = set()
        self._burst = 0
        self._closed = False
        self._descriptor = self._socket.FD
        self._loop.add_reader(self._descriptor, self._wake)

    @property
    def raw(self) -> zmq.Socket:
        """The socket itself, to set options, bind or connect."""
        return self._socket

    async def send(
        self, frames: Sequence[Frame], *, deadline_s: float, whom: str, what: str
    ) -> None:
        """Queue one message, waiting up to `deadline_s` for room; not for a ROUTER, which never
        says which peer has room again. Raises DeadlineExceeded or TransportClosed."""
        await self._retried(
            lambda: self.send_now(frames), self._writers, deadline_s, whom=whom, what=what
        )

    async def receive(self, *, deadline_s: float, whom: str, what: str) -> list[Frame]:
        """The frames of the next message. Raises DeadlineExceeded or TransportClosed."""
        return await self._retried(
            self._receive_now, self._readers, deadline_s, whom=whom, what=what
        )

    def receive_now(self) -> list[Frame] | None:
        """The frames of the next message, or None. Raises TransportClosed."""
        if self._closed:
            raise TransportClosed("the socket is closed")
        try:
            frames = self._receive_now()
        except zmq.Again:
            return None
        if self._readers or self._writers:
            self._wake()
        return frames

    def send_now(self, frames: Sequence[Frame]) -> None:
        """Queue one message or raise zmq.Again; zmq.ZMQError for a peer that a ROUTER lacks;
        TransportClosed."""
        if self._closed:
            raise TransportClosed("the socket is closed")
        send_frames(self._socket, frames, int(zmq.NOBLOCK))

    async def close(self) -> None:
        """Flush for at most LINGER_S, then free everything. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._descriptor)
        for waiter in self._readers | self._writers:
            _resolve(waiter)
        self._socket.close(linger=int(LINGER_S * 1000))
        await asyncio.shield(asyncio.to_thread(end_context, self._context, self._authenticator))

    def _receive_now(self) -> list[Frame]:
        # Frame objects say `more` themselves; asking the socket for RCVMORE costs three times that.
        frames: list[Frame] = []
        num_bytes, has_more = 0, True
        while has_more:
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            has_more = frame.more
            if len(frames) <= MAX_FRAMES and num_bytes <= MAX_MESSAGE_BYTES:
                frames.append(frame.buffer)
                num_bytes += len(frame)
        return frames

    async def _retried(
        self,
        operation: Callable[[], T],
        waiters: set[asyncio.Future[None]],
        deadline_s: float,
        *,
        whom: str,
        what: str,
    ) -> T:
        started_s = self._loop.time()
        self._burst += 1
        if self._burst > MAX_BURST:
            self._burst = 0
            await asyncio.sleep(0)
        while True:
            if self._closed:
                raise TransportClosed(f"closed while waiting for {whom}: {what}")
            with suppress(zmq.Again):
                result = operation()
                if self._readers or self._writers:
                    self._wake()
                return result
            waited_s = self._loop.time() - started_s
            if waited_s >= deadline_s:
                raise DeadlineExceeded(whom, what, waited_s)
            self._burst = 0
            await self._wait(waiters, deadline_s - waited_s)

    async def _wait(self, waiters: set[asyncio.Future[None]], timeout_s: float) -> None:
        waiter = self._loop.create_future()
        waiters.add(waiter)
        timer = self._loop.call_later(timeout_s, _resolve, waiter)
        # Only now: the failed operation may have eaten a signal that was meant for any waiter,
        # this one included.
        self._wake()
        try:
            await waiter
        finally:
            timer.cancel()
            waiters.discard(waiter)

    def _wake(self) -> None:
        # Reading EVENTS also clears the descriptor, which would else keep the loop spinning.
        events = int(self._socket.get(zmq.EVENTS))
        if events & zmq.POLLIN:
            for waiter in self._readers:
                _resolve(waiter)
        if events & zmq.POLLOUT:
            for waiter in self._writers:
                _resolve(waiter)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def send_frames(socket: zmq.Socket, frames: Sequence[Frame], flags: int = 0) -> None:
    """Send one message. A frame that came from a socket goes on as it came: libzmq counts who
    holds it, where memory of Python's is given back by a thread that wants the interpreter."""
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        more = flags | _MORE if index < last else flags
        came = frame.obj if type(frame) is memoryview else None
        if type(came) is zmq.Frame and len(came) == len(frame):
            socket.send(came, more, copy=False)
        else:
            socket.send(frame, more, copy=len(frame) < ZERO_COPY_BYTES)


def set_common_options(socket: zmq.Socket, *, max_frame_bytes: int) -> None:
    """Heartbeats, automatic reconnection and a bound on frames, alike for every socket."""
    socket.LINGER = int(LINGER_S * 1000)
    socket.MAXMSGSIZE = max_frame_bytes
    socket.HEARTBEAT_IVL = int(HEARTBEAT_INTERVAL_S * 1000)
    socket.HEARTBEAT_TIMEOUT = int(HEARTBEAT_TIMEOUT_S * 1000)
    socket.HEARTBEAT_TTL = int(HEARTBEAT_TIMEOUT_S * 1000)
    socket.RECONNECT_IVL = int(RECONNECT_FIRST_S * 1000)
    socket.RECONNECT_IVL_MAX = int(RECONNECT_LONGEST_S * 1000)


def end_context(context: zmq.Context, authenticator: ThreadAuthenticator | None) -> None:
    """Free a context whose sockets are closed; blocks while the last bytes leave."""
    if authenticator is not None:
        authenticator.stop()
    context.term()


def bind(socket: zmq.Socket, host: str, port: int, *, field: str) -> int:
    """Bind to `host` (a name or an address) and return the port, chosen by the kernel when 0.

    A name is looked up here, which blocks: a start-up step.

    Raises ConfigError about `field` (the port), or about `cluster.host`.
    """
    try:
        found = posix.getaddrinfo(host, None, type=posix.SOCK_STREAM)
    except OSError as error:
        raise ConfigError("cluster.host", host, f"no such host ({error})") from error
    if not 0 <= port <= 65535:
        raise ConfigError(field, port, "a port is between 0 and 65535, 0 picks a free one")
    address = str(found[0][4][0])
    try:
        socket.bind(endpoint_at(socket, address, port))
    except zmq.ZMQError as error:
        if error.errno in (zmq.EADDRINUSE, errno.EACCES):
            remedy = f"cannot listen there ({error}): choose another port, or 0 for a free one"
            raise ConfigError(field, port, remedy) from error
        remedy = f"this machine cannot listen at {address} ({error}): name one of its own addresses"
        raise ConfigError("cluster.host", host, remedy) from error
    return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def endpoint_at(socket: zmq.Socket, host: str, port: int) -> str:
    """ZeroMQ endpoint of `host`; allows IPv6 on `socket` when `host` is such an address."""
    with suppress(ValueError):
        if ipaddress.ip_address(host).version == 6:
            socket.IPV6 = 1
            return f"tcp://[{host}]:{port}"
    return f"tcp://{host}:{port}"
