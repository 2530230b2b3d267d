"""A ZeroMQ socket for asyncio: every wait has a deadline, and one wake-up serves many messages.

An operation is tried immediately and waits only if the socket is not ready. libzmq signals through
an edge-triggered descriptor, and any operation may consume the signal. Each operation therefore
re-checks the socket for waiters of the other direction.

libzmq limits the size of a frame (`MAXMSGSIZE`) but not the number of frames of a message. Excess
frames are dropped, and enough of them is kept for the codec to reject the message.
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
from speed_async.transport.curve import Context, Keys, Socket, configure_curve

T = TypeVar("T")

HEARTBEAT_INTERVAL_S = 2.0
HEARTBEAT_TIMEOUT_S = 10.0
LONGEST_HEARTBEAT_S = 6000.0
"""The protocol has 16 bits for it, in tenths of a second."""
CONNECT_TIMEOUT_S = 5.0
"""An attempt to connect is given up after this time and made again. The kernel alone repeats it at
doubling intervals, and could wait as long again after a network has returned."""
HANDSHAKE_TIMEOUT_S = 5.0
"""Heartbeats begin after the handshake. A connection whose other end died before it is given up
after this time; the default of ZeroMQ, 30 s, would leave a peer without its service that long."""
RECONNECT_FIRST_S = 0.05
RECONNECT_LONGEST_S = 1.0
LINGER_S = 2.0
"""Time that `close` waits for queued messages to be sent."""
ZERO_COPY_BYTES = 64 * 1024
"""Frames of at least this size are sent without a copy; copying smaller frames is cheaper."""
MAX_BURST = 32
"""Maximum consecutive operations before yielding to the event loop."""
_MORE = int(zmq.SNDMORE)


class PolledSocket:
    """A socket of type `kind` in its own context. Create and use it in one running event loop."""

    def __init__(
        self,
        kind: int,
        *,
        outbox_messages: int,
        inbox_messages: int,
        max_frame_bytes: int = MAX_MESSAGE_BYTES,
        silence_s: float = HEARTBEAT_TIMEOUT_S,
        keys: Keys | None = None,
    ) -> None:
        """`keys` enables CURVE, for the service (ServerKeys) or for a client (ClientKeys).
        `silence_s`: a connection on which nothing arrives for this long is closed."""
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(kind)
        self._socket.SNDHWM = outbox_messages
        self._socket.RCVHWM = inbox_messages
        set_common_options(self._socket, max_frame_bytes=max_frame_bytes, silence_s=silence_s)
        self._authenticator = configure_curve(self._socket, keys)
        self._readers: set[asyncio.Future[None]] = set()
        self._writers: set[asyncio.Future[None]] = set()
        self._burst = 0
        self._closed = False
        self._descriptor = self._socket.FD
        self._loop.add_reader(self._descriptor, self._wake)

    @property
    def raw(self) -> Socket:
        """The underlying socket, to set options, bind or connect."""
        return self._socket

    async def send(
        self, frames: Sequence[Frame], *, deadline_s: float, peer: str, what: str
    ) -> None:
        """Queue one message; waits up to `deadline_s` for space in the queue.

        Not for a ROUTER, which does not report when the queue of a peer has space. Raises
        DeadlineExceeded or TransportClosed.
        """
        await self._retry_until_ready(
            lambda: self.send_now(frames), self._writers, deadline_s, peer=peer, what=what
        )

    async def receive(self, *, deadline_s: float, peer: str, what: str) -> list[Frame]:
        """Wait for the frames of the next message. Raises DeadlineExceeded or TransportClosed."""
        return await self._retry_until_ready(
            self._receive_now, self._readers, deadline_s, peer=peer, what=what
        )

    def receive_now(self) -> list[Frame] | None:
        """Return the frames of the next message, or None. Raises TransportClosed."""
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
        """Queue one message without waiting.

        Raises zmq.Again if the queue is full, zmq.ZMQError if a ROUTER does not have the peer, and
        TransportClosed.
        """
        if self._closed:
            raise TransportClosed("the socket is closed")
        send_frames(self._socket, frames, int(zmq.NOBLOCK))

    async def close(self) -> None:
        """Flush for at most LINGER_S, then release all resources. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._descriptor)
        for waiter in self._readers | self._writers:
            _resolve(waiter)
        self._socket.close(linger=int(LINGER_S * 1000))
        await asyncio.shield(asyncio.to_thread(end_context, self._context, self._authenticator))

    def _receive_now(self) -> list[Frame]:
        # `frame.more` is three times cheaper than reading RCVMORE from the socket.
        frames: list[Frame] = []
        num_bytes, has_more = 0, True
        while has_more:
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            has_more = frame.more
            if len(frames) <= MAX_FRAMES and num_bytes <= MAX_MESSAGE_BYTES:
                frames.append(frame.buffer)
                num_bytes += len(frame)
        return frames

    async def _retry_until_ready(
        self,
        operation: Callable[[], T],
        waiters: set[asyncio.Future[None]],
        deadline_s: float,
        *,
        peer: str,
        what: str,
    ) -> T:
        started_s = self._loop.time()
        self._burst += 1
        if self._burst > MAX_BURST:
            self._burst = 0
            await asyncio.sleep(0)
        while True:
            if self._closed:
                raise TransportClosed(f"the socket was closed while waiting for {peer}: {what}")
            with suppress(zmq.Again):
                result = operation()
                if self._readers or self._writers:
                    self._wake()
                return result
            waited_s = self._loop.time() - started_s
            if waited_s >= deadline_s:
                raise DeadlineExceeded(peer, what, waited_s)
            self._burst = 0
            await self._wait(waiters, deadline_s - waited_s)

    async def _wait(self, waiters: set[asyncio.Future[None]], timeout_s: float) -> None:
        waiter = self._loop.create_future()
        waiters.add(waiter)
        timer = self._loop.call_later(timeout_s, _resolve, waiter)
        # After adding the waiter: the failed operation may have consumed the signal for any
        # waiter, including this one.
        self._wake()
        try:
            await waiter
        finally:
            timer.cancel()
            waiters.discard(waiter)

    def _wake(self) -> None:
        # Reading EVENTS also clears the descriptor; otherwise the event loop would spin.
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


def send_frames(socket: Socket, frames: Sequence[Frame], flags: int = 0) -> None:
    """Send one message.

    A received frame is forwarded as a `zmq.Frame`: libzmq counts its references, while releasing
    Python memory from the I/O thread requires the GIL.
    """
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        more = flags | _MORE if index < last else flags
        received = frame.obj if type(frame) is memoryview else None
        if isinstance(received, zmq.Frame) and len(received) == len(frame):
            socket.send(received, more, copy=False)
        else:
            socket.send(frame, more, copy=len(frame) < ZERO_COPY_BYTES)


def set_common_options(
    socket: Socket, *, max_frame_bytes: int, silence_s: float = HEARTBEAT_TIMEOUT_S
) -> None:
    """Set heartbeats, automatic reconnection and the frame size limit."""
    socket.LINGER = int(LINGER_S * 1000)
    socket.MAXMSGSIZE = max_frame_bytes
    socket.HEARTBEAT_IVL = int(HEARTBEAT_INTERVAL_S * 1000)
    socket.HEARTBEAT_TIMEOUT = int(min(silence_s, LONGEST_HEARTBEAT_S) * 1000)
    socket.HEARTBEAT_TTL = int(min(silence_s, LONGEST_HEARTBEAT_S) * 1000)
    socket.CONNECT_TIMEOUT = int(CONNECT_TIMEOUT_S * 1000)
    socket.HANDSHAKE_IVL = int(HANDSHAKE_TIMEOUT_S * 1000)
    socket.RECONNECT_IVL = int(RECONNECT_FIRST_S * 1000)
    socket.RECONNECT_IVL_MAX = int(RECONNECT_LONGEST_S * 1000)


def end_context(context: Context, authenticator: ThreadAuthenticator | None) -> None:
    """Terminate a context whose sockets are closed; blocks while the last bytes are sent."""
    if authenticator is not None:
        authenticator.stop()
    context.term()


def bind(socket: Socket, host: str, port: int, *, field: str) -> int:
    """Bind to `host` (a name or an address) and return the port; the kernel picks one if it is 0.

    Blocks while a name is resolved, so call it only at start-up.

    Raises ConfigError for `field` (the port) or `cluster.host`.
    """
    try:
        found = posix.getaddrinfo(host, None, type=posix.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            "cluster.host", host, f"the host name cannot be resolved ({error})"
        ) from error
    if not 0 <= port <= 65535:
        raise ConfigError(field, port, "a port must be between 0 and 65535; 0 picks a free port")
    address = str(found[0][4][0])
    try:
        socket.bind(endpoint_at(socket, address, port))
    except zmq.ZMQError as error:
        if error.errno in (zmq.EADDRINUSE, errno.EACCES):
            remedy = f"cannot bind this port ({error}): choose another port, or 0 for a free one"
            raise ConfigError(field, port, remedy) from error
        remedy = f"cannot bind {address} on this machine ({error}): use one of its own addresses"
        raise ConfigError("cluster.host", host, remedy) from error
    return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def endpoint_at(socket: Socket, host: str, port: int) -> str:
    """Return the ZeroMQ endpoint of `host`. Enables IPv6 on `socket` for an IPv6 address."""
    with suppress(ValueError):
        if ipaddress.ip_address(host).version == 6:
            socket.IPV6 = 1
            return f"tcp://[{host}]:{port}"
    return f"tcp://{host}:{port}"
