"""The weight group of one epoch on one machine: a socket between the sender and every receiver.

The sockets are Unix sockets in the abstract namespace. They need no cleanup after a crash, and the
exit of one process is detected by its peer at once. The secret socket name is sent through the
store; both peers verify that the other process has the same user. Messages are small (the manifest,
bucket notifications, a file descriptor); the weights are in memory shared by all ranks.

A frame has a kind, a number and, for MESSAGE and MEMORY, that number of payload bytes.

Shape legend: B bytes of one message.
"""

import json
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from speed_async.types import WeightOffer
from speed_async.weight_sync.buckets import NUM_BUFFERS

HEADER = struct.Struct("<IQ")
PEER_CREDENTIALS = struct.Struct("3i")  # SO_PEERCRED: process, user, group
MAX_PAYLOAD_BYTES = 32 * 1024 * 1024
SOCKET_KEY = "socket"
ONE_MACHINE = (
    "backend 'ipc' needs the learner and its actors on one machine, in one network namespace and"
    " under one user; set weights.backend = 'gloo' or 'nccl'"
)


class Kind(IntEnum):
    HELLO = 1  # number: the receiver's rank
    MESSAGE = 2  # number: bytes of the message
    MEMORY = 3  # number: bytes of its description
    READY = 4  # number: index of the bucket
    TAKEN = 5  # number: index of the bucket


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    kind: Kind
    number: int
    payload: bytes = b""
    descriptor: int | None = None
    """An open file descriptor; the receiver of the frame closes it."""


class IpcGroup:
    """The sockets of one member, keyed by rank. Failures are RuntimeErrors that name the rank."""

    def __init__(self, sockets: dict[int, socket.socket]) -> None:
        self.buffers_B: list[Tensor] = []
        """Memory shared by all members; see `shared_memory.py`."""
        self.num_sent = 0
        self.num_sent_at = [0] * NUM_BUFFERS
        """For each buffer, the number of buckets sent up to and including its last use."""
        self._sockets = sockets
        self._num_taken = dict.fromkeys(sockets, 0)

    def broadcast(self, message_B: Tensor, deadline_s: float) -> None:
        """Broadcasts a small message from rank 0, in host memory, (B,) uint8."""
        if 0 not in self._sockets:
            self.send(Kind.MESSAGE, message_B.numel(), deadline_s, message_B.numpy().tobytes())
            return
        frame = self.receive(0, deadline_s)
        if frame.kind is not Kind.MESSAGE or frame.number != message_B.numel():
            raise RuntimeError(
                f"rank 0 sent {frame.kind.name} {frame.number}, expected"
                f" {Kind.MESSAGE.name} {message_B.numel()}"
            )
        message_B.copy_(torch.frombuffer(bytearray(frame.payload), dtype=torch.uint8))

    def send(
        self,
        kind: Kind,
        number: int,
        deadline_s: float,
        payload: bytes = b"",
        descriptors: Sequence[int] = (),
    ) -> None:
        """Sends one frame to every connected member."""
        deadline = time.monotonic() + deadline_s
        for rank, peer in self._sockets.items():
            try:
                peer.settimeout(max(deadline - time.monotonic(), 0.001))
                socket.send_fds(peer, [HEADER.pack(kind, number)], descriptors)
                peer.sendall(payload)
            except TimeoutError as error:
                raise RuntimeError(f"rank {rank} does not read its socket") from error
            except OSError as error:
                raise RuntimeError(f"rank {rank} closed its connection") from error

    def send_memory(
        self, description: dict[str, object], descriptor: int | None, deadline_s: float
    ) -> None:
        """Sender: sends the description and the descriptor of the shared memory."""
        payload = json.dumps(description).encode()
        descriptors = [] if descriptor is None else [descriptor]
        self.send(Kind.MEMORY, len(payload), deadline_s, payload, descriptors)

    def receive(self, rank: int, deadline_s: float) -> Frame:
        """The next frame of one member."""
        try:
            return receive_frame(self._sockets[rank], time.monotonic() + deadline_s)
        except TimeoutError as error:
            raise RuntimeError(f"rank {rank} sent nothing") from error
        except (OSError, ValueError) as error:
            raise RuntimeError(f"rank {rank}: {error}") from error

    def await_taken(self, num_taken: int, deadline_s: float) -> None:
        """Sender: waits until every receiver has loaded this number of buckets of the epoch."""
        deadline = time.monotonic() + deadline_s
        while behind := [rank for rank, taken in self._num_taken.items() if taken < num_taken]:
            poll = select.poll()
            ranks = {self._sockets[rank].fileno(): rank for rank in behind}
            for descriptor in ranks:
                poll.register(descriptor, select.POLLIN)
            ready = poll.poll(max(0.0, 1000 * (deadline - time.monotonic())))
            if not ready:
                names = f"rank{'s' if len(behind) > 1 else ''} {', '.join(map(str, behind))}"
                raise RuntimeError(f"{names} did not load an earlier bucket")
            for descriptor, _ in ready:
                rank = ranks[descriptor]
                if self.receive(rank, deadline_s).kind is not Kind.TAKEN:
                    raise RuntimeError(f"rank {rank} sent an unexpected frame")
                self._num_taken[rank] += 1

    def abort(self) -> None:
        """Closes every connection, which wakes waiting peers."""
        for peer in self._sockets.values():
            peer.close()


def machine_identity() -> str:
    """Identity of this machine until its next boot, as JSON."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return json.dumps({"boot": boot, "host": socket.gethostname()})


def machine_mismatch(ours: str, theirs: str) -> str:
    """Empty when both identities are of one machine; otherwise the error message."""
    try:
        here, there = json.loads(ours), json.loads(theirs)
        if here["boot"] == there["boot"]:
            return ""
        return f"runs on '{there['host']}' and rank 0 on '{here['host']}': {ONE_MACHINE}"
    except (ValueError, TypeError, KeyError):
        return f"did not report its machine: {ONE_MACHINE}"


def host_ipc(store: Store, offer: WeightOffer) -> IpcGroup:
    """Sender: accepts connections of all receivers. Raises RuntimeError naming missing ranks."""
    deadline = time.monotonic() + offer.deadline_s
    sockets: dict[int, socket.socket] = {}
    token = secrets.token_hex(16)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(_address(token))
        listener.listen(offer.world_size)
        store.set(SOCKET_KEY, token)
        while missing := [rank for rank in range(1, offer.world_size) if rank not in sockets]:
            try:
                listener.settimeout(max(deadline - time.monotonic(), 0.001))
                peer, _ = listener.accept()
            except TimeoutError as error:
                names = ", ".join(map(str, missing))
                raise RuntimeError(f"no connection from rank {names}") from error
            rank = _hello_rank(peer, deadline)
            if rank in missing:
                sockets[rank] = peer
            else:
                peer.close()
    return IpcGroup(sockets)


def join_ipc(store: Store, offer: WeightOffer) -> IpcGroup:
    """Receiver: connects to the sender. Raises RuntimeError."""
    token = store.get(SOCKET_KEY).decode(errors="replace")
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.settimeout(offer.deadline_s)
        peer.connect(_address(token))
        if not _is_same_user(peer):
            raise RuntimeError(f"rank 0 belongs to another user: {ONE_MACHINE}")
        peer.sendall(HEADER.pack(Kind.HELLO, offer.rank))
    except OSError as error:
        peer.close()
        raise RuntimeError(f"rank 0 cannot be reached ({error}): {ONE_MACHINE}") from error
    except RuntimeError:
        peer.close()
        raise
    return IpcGroup({0: peer})


def receive_frame(peer: socket.socket, deadline: float) -> Frame:
    """The next frame. Raises TimeoutError, OSError when the peer is gone, and ValueError for a
    malformed frame."""
    header, descriptors = _receive(peer, HEADER.size, deadline)
    code, number = HEADER.unpack(header)
    kind = Kind(code)
    if kind not in (Kind.MESSAGE, Kind.MEMORY):
        return Frame(kind=kind, number=number)
    if number > MAX_PAYLOAD_BYTES:
        raise ValueError(f"announced {number} bytes")
    payload, _ = _receive(peer, number, deadline)
    descriptor = descriptors[0] if descriptors else None
    return Frame(kind=kind, number=number, payload=payload, descriptor=descriptor)


def _receive(peer: socket.socket, num_bytes: int, deadline: float) -> tuple[bytes, list[int]]:
    received, descriptors = bytearray(), []
    while len(received) < num_bytes:
        peer.settimeout(max(deadline - time.monotonic(), 0.001))
        part, received_descriptors, _, _ = socket.recv_fds(
            peer, num_bytes - len(received), 1, socket.MSG_CMSG_CLOEXEC
        )
        if not part:
            raise ConnectionResetError("closed its connection")
        received += part
        descriptors += received_descriptors
    return bytes(received), descriptors


def _hello_rank(peer: socket.socket, deadline: float) -> int | None:
    """The rank of the peer; None for a peer that is not a member."""
    try:
        frame = receive_frame(peer, deadline) if _is_same_user(peer) else None
    except (OSError, ValueError):
        return None
    return frame.number if frame is not None and frame.kind is Kind.HELLO else None


def _is_same_user(peer: socket.socket) -> bool:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    return PEER_CREDENTIALS.unpack(credentials)[1] == os.geteuid()


def _address(token: str) -> str:
    return f"\0speed-async-weights-{token}"
