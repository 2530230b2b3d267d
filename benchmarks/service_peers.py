"""Peers that use real sockets and messages like actors and learners do, with synthetic groups."""

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

ACK_INTERVAL = 16
"""Unacknowledged messages received before an acknowledgement is sent."""


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Z85 text. Of the server's keys, only the public one."""

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
    """A group encoded once and sent many times, each time with another header. Peers are as light
    as bare ZeroMQ, so that only the service is measured."""

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
class ReceivedGroup(m.Message):
    """A group of a batch of which only the header was decoded."""

    lease_id: int
    num_tokens: int


def _decode_header(frames: list[Frame]) -> m.Message:
    if len(frames) < 8:
        return decode(frames)
    _, _, _, values, _ = msgpack.unpackb(frames[0])
    return ReceivedGroup(
        number=values["number"],
        heard=values["heard"],
        lease_id=values["lease_id"],
        num_tokens=len(frames[5]) // 4,
    )


class Peer:
    """An actor's or learner's end of a session, on a blocking socket."""

    def __init__(self, context: zmq.Context, port: int, name: str, keys: Keys | None) -> None:
        self.name = name
        self.socket: zmq.Socket = context.socket(zmq.DEALER)
        set_client_options(self.socket, name, keys)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.unacknowledged: deque[tuple[int, float]] = deque()
        """Groups sent and not acknowledged: message number and send time."""
        self.latencies_s: list[float] = []
        self.descriptor = int(self.socket.get(zmq.FD))
        self._number = 0
        self._last_received = 0
        self._acknowledged = 0

    def send(self, message: m.Message) -> None:
        number, heard = self._next_number()
        send_frames(self.socket, encode(replace(message, number=number, heard=heard)))

    def send_group(
        self, group: "PackedGroup", values: dict[str, object], due_s: float | None = None
    ) -> None:
        """Send a group with packed arrays; `values` go into its header. The wait for its
        acknowledgement starts now, or at `due_s`."""
        number, heard = self._next_number()
        self.unacknowledged.append((number, time.monotonic() if due_s is None else due_s))
        send_frames(self.socket, group.frames(values | {"number": number, "heard": heard}))

    def _next_number(self) -> tuple[int, int]:
        self._number += 1
        self._acknowledged = self._last_received
        return self._number, self._last_received

    def receive(self, timeout_s: float) -> m.Message | None:
        """The next message that is not the session's own. None on timeout."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            if self.socket.poll(int(1000 * left_s)) and (message := self.receive_now()):
                return message
        return None

    def receive_now(self) -> m.Message | None:
        """Like `receive`, without waiting. None when nothing is left to read."""
        while int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            message = _decode_header(receive_frames(self.socket))
            self._acknowledge(message)
            if isinstance(message, Nack | m.Rejected):
                raise RuntimeError(f"{self.name} received {message}")
            if isinstance(message, Ping):
                self._send_ack()
            elif message.number:
                self._last_received = message.number
                if self._last_received - self._acknowledged > ACK_INTERVAL:
                    self._send_ack()
            if not isinstance(message, Ack | Ping):
                return message
        return None

    def close(self) -> None:
        self.socket.close(linger=0)

    def _acknowledge(self, message: m.Message) -> None:
        now_s = time.monotonic()
        while self.unacknowledged and self.unacknowledged[0][0] <= message.heard:
            self.latencies_s.append(now_s - self.unacknowledged.popleft()[1])

    def _send_ack(self) -> None:
        self._acknowledged = self._last_received
        send_frames(self.socket, encode(Ack(heard=self._last_received)))
