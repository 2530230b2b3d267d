"""Bare ROUTER and DEALER sockets that move the service's frames over the same hops.

One ROUTER, one DEALER that sends groups and one that receives them, in plain blocking loops. The
router inspects nothing: it answers every group with a frame of the size of an acknowledgement,
forwards the group unchanged, and grants the sender 16 more credits when the receiver has
acknowledged 16 groups. Queue bounds, socket options and copying are those of the project's sockets.
"""

from contextlib import suppress
from multiprocessing.sharedctypes import Synchronized

import zmq

from benchmarks.service_peers import (
    Keys,
    receive_frames,
    set_client_options,
)
from benchmarks.service_roles import GROUPS_A_BATCH, make_group
from speed_async.transport.codec import MAX_MESSAGE_BYTES
from speed_async.transport.sockets import send_frames, set_common_options
from speed_async.transport.zeromq import QUEUED_MESSAGES

ACKNOWLEDGED = b"a" * 64
MORE_CREDITS = b"m" * 64
RECEIVER = b"learner"
HELLO = b"h"
GO = b"g"


def route(port: "Synchronized[int]", server: tuple[bytes, bytes] | None) -> None:
    """`server`: public and secret key of a CURVE server."""
    socket: zmq.Socket = zmq.Context().socket(zmq.ROUTER)
    socket.SNDHWM = socket.RCVHWM = QUEUED_MESSAGES
    socket.ROUTER_MANDATORY = 1
    set_common_options(socket, max_frame_bytes=MAX_MESSAGE_BYTES)
    if server is not None:
        socket.CURVE_SERVER = 1
        socket.CURVE_PUBLICKEY, socket.CURVE_SECRETKEY = server
    port.value = socket.bind_to_random_port("tcp://127.0.0.1")
    with suppress(zmq.ZMQError):  # the peers are closed: the measurement is over
        _forward(socket)


def _forward(socket: zmq.Socket) -> None:
    names = {socket.recv_multipart()[0], socket.recv_multipart()[0]}  # the hello of both
    (receiver,) = {name for name in names if name.startswith(RECEIVER + b"/")}
    (sender,) = names - {receiver}
    socket.send_multipart([sender, GO])
    while True:
        identity, *frames = socket.recv_multipart(copy=False)
        if identity.bytes == receiver:
            socket.send_multipart([sender, MORE_CREDITS])
            continue
        socket.send_multipart([sender, ACKNOWLEDGED])
        send_frames(socket, [receiver, *[frame.buffer for frame in frames]])


def send(port: int, tokens_each: int, credits: int, keys: Keys | None) -> None:
    socket: zmq.Socket = zmq.Context().socket(zmq.DEALER)
    set_client_options(socket, "actor-1.0", keys)
    socket.connect(f"tcp://127.0.0.1:{port}")
    frames = make_group(tokens_each).frames({})
    socket.send(HELLO)
    assert socket.recv() == GO
    available = credits
    while True:
        while available > 0:
            send_frames(socket, frames)
            available -= 1
        if socket.recv() == MORE_CREDITS:
            available += GROUPS_A_BATCH


def take(port: int, num_groups: "Synchronized[int]", keys: Keys | None) -> None:
    socket: zmq.Socket = zmq.Context().socket(zmq.DEALER)
    set_client_options(socket, RECEIVER.decode(), keys)
    socket.connect(f"tcp://127.0.0.1:{port}")
    socket.send(HELLO)
    while True:
        receive_frames(socket)
        num_groups.value += 1
        if num_groups.value % GROUPS_A_BATCH == 0:
            socket.send(ACKNOWLEDGED)
