"""Peers that talk to the service over real sockets as actors and learners do, but make up their
groups."""

import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import msgpack
import zmq

from speed_async.transport import messages as m
from speed_async.transport.codec import MAX_MESSAGE_BYTES, Frame, decode, encode
from speed_async.transport.peer_names import new_identity
from speed_async.transport.session import Ack, Nack, Ping
from speed_async.transport.sockets import send_frames, set_common_options
from speed_async.transport.zeromq import QUEUED_MESSAGES

TELL_AFTER = 16
"""Messages that may come before the service is told that they came."""


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Z85 text; of the server the public part alone."""

    folder: Path
    server_public: bytes
    public: bytes
    secret: bytes


def set_client_options(socket: zmq.Socket, name: str, keys: Keys | None) -> None:
    socket.IDENTITY = new_identity(name)
    socket.SNDHWM = socket.RCVHWM = QUEUED_MESSAGES
    set_common_options(socket, max_frame_bytes=MAX_MESSAGE_BYTES)
    socket.LINGER = 0
    if keys is not None:
        socket.CURVE_SERVERKEY = keys.server_public
        socket.CURVE_PUBLICKEY, socket.CURVE_SECRETKEY = keys.public, keys.secret


def receive_frames(socket: zmq.Socket, flags: int = 0) -> list[Frame]:
    return [frame.buffer for frame in socket.recv_multipart(flags, copy=False)]


class PackedGroup:
    """A group ready to be sent many times, each time under another header. Peers are as light as
    bare ZeroMQ's, so that what is measured is the service."""

    def __init__(self, group: m.GroupFinished) -> None:
        header, *self._arrays = encode(group)
        self._header = msgpack.unpackb(header)
        self.num_tokens = len(group.token_ids)

    def frames(self, values: dict[str, object]) -> list[Frame]:
        magic, version, kind, before, specs = self._header
        header = msgpack.packb([magic, version, kind, before | values, specs])
        assert header is not None
        return [header, *self._arrays]


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenGroup(m.Message):
    """A group of a batch of which only the header was read."""

    lease_id: int
    num_tokens: int


def _opened(frames: list[Frame]) -> m.Message:
    if len(frames) < 8:
        return decode(frames)
    _, _, _, values, _ = msgpack.unpackb(frames[0])
    return SeenGroup(
        number=values["number"],
        heard=values["heard"],
        lease_id=values["lease_id"],
        num_tokens=len(frames[5]) // 4,
    )


class Peer:
    """An actor's or learner's end of a conversation, on a socket that blocks."""

    def __init__(self, context: zmq.Context, port: int, name: str, keys: Keys | None) -> None:
        self.name = name
        self.socket: zmq.Socket = context.socket(zmq.DEALER)
        set_client_options(self.socket, name, keys)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.unheard: deque[tuple[int, float]] = deque()
        """Groups sent and not acknowledged: number of the message, and when it was sent."""
        self.latencies_s: list[float] = []
        self.descriptor = int(self.socket.get(zmq.FD))
        self._number = 0
        self._heard = 0
        self._told = 0

    def say(self, message: m.Message) -> None:
        number, heard = self._next_number()
        send_frames(self.socket, encode(replace(message, number=number, heard=heard)))

    def say_group(
        self, group: "PackedGroup", values: dict[str, object], due_s: float | None = None
    ) -> None:
        """A group whose arrays are packed already; `values` go into its header. Its wait for an
        acknowledgement begins now, or began when it was due."""
        number, heard = self._next_number()
        self.unheard.append((number, time.monotonic() if due_s is None else due_s))
        send_frames(self.socket, group.frames(values | {"number": number, "heard": heard}))

    def _next_number(self) -> tuple[int, int]:
        self._number += 1
        self._told = self._heard
        return self._number, self._heard

    def hear(self, timeout_s: float) -> m.Message | None:
        """The next message that is not the session's own; None when there is none in time."""
        ends_s = time.monotonic() + timeout_s
        while (left_s := ends_s - time.monotonic()) > 0:
            if self.socket.poll(int(1000 * left_s)) and (message := self.hear_now()):
                return message
        return None

    def hear_now(self) -> m.Message | None:
        """Likewise, without waiting. None says that all was read."""
        while int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            message = _opened(receive_frames(self.socket))
            self._acknowledge(message)
            if isinstance(message, Nack | m.Rejected):
                raise RuntimeError(f"{self.name} was told {message}")
            if isinstance(message, Ping):
                self._send_heard()
            elif message.number:
                self._heard = message.number
                if self._heard - self._told > TELL_AFTER:
                    self._send_heard()
            if not isinstance(message, Ack | Ping):
                return message
        return None

    def close(self) -> None:
        self.socket.close(linger=0)

    def _acknowledge(self, message: m.Message) -> None:
        now_s = time.monotonic()
        while self.unheard and self.unheard[0][0] <= message.heard:
            self.latencies_s.append(now_s - self.unheard.popleft()[1])

    def _send_heard(self) -> None:
        self._told = self._heard
        send_frames(self.socket, encode(Ack(heard=self._heard)))
