"""The members of one epoch on one machine: a socket between the sender and every receiver.

A Unix socket in the abstract namespace: nothing of it is left when its processes are gone, however
they end, and the end of one is seen at once by the other. The socket's secret name travels in the
store; both ends check that the other one belongs to their user. What travels here is small (the
manifest, who has which bucket, a file descriptor); the weights lie in memory that all ranks share.

A frame is its kind, a number and, where the number says so, that many bytes.

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
PEER = struct.Struct("3i")  # what SO_PEERCRED gives: process, user, group
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
    """An open file; whoever gets the frame closes it."""


class IpcGroup:
    """One member's sockets by rank. Every failure is a RuntimeError that names the rank."""

    def __init__(self, links: dict[int, socket.socket]) -> None:
        self.buffers_B: list[Tensor] = []
        """Memory that all members share; see `shared_memory.py`."""
        self.num_passed_on = 0
        self.num_passed_on_at = [0] * NUM_BUFFERS
        """How many buckets had been passed on when each buffer last was, itself included."""
        self._links = links
        self._num_taken = dict.fromkeys(links, 0)

    def broadcast(self, message_B: Tensor, deadline_s: float) -> None:
        """From rank 0 to all others: a small message in host memory, (B,) uint8."""
        if 0 not in self._links:
            self.tell(Kind.MESSAGE, message_B.numel(), deadline_s, message_B.numpy().tobytes())
            return
        frame = self.hear(0, deadline_s)
        if frame.kind is not Kind.MESSAGE or frame.number != message_B.numel():
            raise RuntimeError(f"rank 0 sent {frame.kind.name} {frame.number}, not the message")
        message_B.copy_(torch.frombuffer(bytearray(frame.payload), dtype=torch.uint8))

    def tell(
        self,
        kind: Kind,
        number: int,
        deadline_s: float,
        payload: bytes = b"",
        descriptors: Sequence[int] = (),
    ) -> None:
        """Send one frame to every member at the other end."""
        ends_s = time.monotonic() + deadline_s
        for rank, link in self._links.items():
            try:
                link.settimeout(max(ends_s - time.monotonic(), 0.001))
                socket.send_fds(link, [HEADER.pack(kind, number)], descriptors)
                link.sendall(payload)
            except TimeoutError as error:
                raise RuntimeError(f"rank {rank} takes nothing") from error
            except OSError as error:
                raise RuntimeError(f"rank {rank} closed its connection") from error

    def tell_memory(
        self, description: dict[str, object], descriptor: int | None, deadline_s: float
    ) -> None:
        """Sender: hand over the memory that all will share."""
        payload = json.dumps(description).encode()
        descriptors = [] if descriptor is None else [descriptor]
        self.tell(Kind.MEMORY, len(payload), deadline_s, payload, descriptors)

    def hear(self, rank: int, deadline_s: float) -> Frame:
        """The next frame from one member."""
        try:
            return receive_frame(self._links[rank], time.monotonic() + deadline_s)
        except TimeoutError as error:
            raise RuntimeError(f"rank {rank} sent nothing") from error
        except (OSError, ValueError) as error:
            raise RuntimeError(f"rank {rank}: {error}") from error

    def await_taken(self, num_taken: int, deadline_s: float) -> None:
        """Sender: wait until every receiver has taken that many buckets of this epoch."""
        ends_s = time.monotonic() + deadline_s
        while behind := [rank for rank, taken in self._num_taken.items() if taken < num_taken]:
            poll = select.poll()
            ranks = {self._links[rank].fileno(): rank for rank in behind}
            for descriptor in ranks:
                poll.register(descriptor, select.POLLIN)
            ready = poll.poll(max(0.0, 1000 * (ends_s - time.monotonic())))
            if not ready:
                who = f"rank{'s' if len(behind) > 1 else ''} {', '.join(map(str, behind))}"
                raise RuntimeError(f"{who} did not take an earlier bucket")
            for descriptor, _ in ready:
                rank = ranks[descriptor]
                if self.hear(rank, deadline_s).kind is not Kind.TAKEN:
                    raise RuntimeError(f"rank {rank} sent something else than its receipt")
                self._num_taken[rank] += 1

    def abort(self) -> None:
        """Close every connection, which wakes whoever waits at the other end."""
        for link in self._links.values():
            link.close()


def machine_identity() -> str:
    """What tells this machine, as long as it runs, from every other; JSON."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return json.dumps({"boot": boot, "host": socket.gethostname()})


def same_machine(ours: str, theirs: str) -> str:
    """Empty when two identities are of one machine; otherwise what is wrong."""
    try:
        here, there = json.loads(ours), json.loads(theirs)
        if here["boot"] == there["boot"]:
            return ""
        return f"runs on '{there['host']}' and rank 0 on '{here['host']}': {ONE_MACHINE}"
    except (ValueError, TypeError, KeyError):
        return f"did not say on which machine it runs: {ONE_MACHINE}"


def host_ipc(store: Store, offer: WeightOffer) -> IpcGroup:
    """Sender: connections from all receivers. Raises RuntimeError naming those that are missing."""
    ends_s = time.monotonic() + offer.deadline_s
    links: dict[int, socket.socket] = {}
    token = secrets.token_hex(16)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(_address(token))
        listener.listen(offer.world_size)
        store.set(SOCKET_KEY, token)
        while missing := [rank for rank in range(1, offer.world_size) if rank not in links]:
            try:
                listener.settimeout(max(ends_s - time.monotonic(), 0.001))
                link, _ = listener.accept()
            except TimeoutError as error:
                names = ", ".join(map(str, missing))
                raise RuntimeError(f"no connection from rank {names}") from error
            rank = _greeted_by(link, ends_s)
            if rank in missing:
                links[rank] = link
            else:
                link.close()
    return IpcGroup(links)


def join_ipc(store: Store, offer: WeightOffer) -> IpcGroup:
    """Receiver: the connection to the sender. Raises RuntimeError."""
    token = store.get(SOCKET_KEY).decode(errors="replace")
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.settimeout(offer.deadline_s)
        link.connect(_address(token))
        if not _is_ours(link):
            raise RuntimeError(f"rank 0 belongs to another user: {ONE_MACHINE}")
        link.sendall(HEADER.pack(Kind.HELLO, offer.rank))
    except OSError as error:
        link.close()
        raise RuntimeError(f"rank 0 is not to be reached ({error}): {ONE_MACHINE}") from error
    except RuntimeError:
        link.close()
        raise
    return IpcGroup({0: link})


def receive_frame(link: socket.socket, ends_s: float) -> Frame:
    """The next frame. Raises TimeoutError, OSError when the other end is gone, ValueError."""
    header, descriptors = _receive(link, HEADER.size, ends_s)
    code, number = HEADER.unpack(header)
    kind = Kind(code)
    if kind not in (Kind.MESSAGE, Kind.MEMORY):
        return Frame(kind=kind, number=number)
    if number > MAX_PAYLOAD_BYTES:
        raise ValueError(f"announced {number} bytes")
    payload, _ = _receive(link, number, ends_s)
    descriptor = descriptors[0] if descriptors else None
    return Frame(kind=kind, number=number, payload=payload, descriptor=descriptor)


def _receive(link: socket.socket, num_bytes: int, ends_s: float) -> tuple[bytes, list[int]]:
    received, descriptors = bytearray(), []
    while len(received) < num_bytes:
        link.settimeout(max(ends_s - time.monotonic(), 0.001))
        part, came, _, _ = socket.recv_fds(
            link, num_bytes - len(received), 1, socket.MSG_CMSG_CLOEXEC
        )
        if not part:
            raise ConnectionResetError("closed its connection")
        received += part
        descriptors += came
    return bytes(received), descriptors


def _greeted_by(link: socket.socket, ends_s: float) -> int | None:
    """The rank at the other end; None for whoever is no member."""
    try:
        frame = receive_frame(link, ends_s) if _is_ours(link) else None
    except (OSError, ValueError):
        return None
    return frame.number if frame is not None and frame.kind is Kind.HELLO else None


def _is_ours(link: socket.socket) -> bool:
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
    return PEER.unpack(credentials)[1] == os.geteuid()


def _address(token: str) -> str:
    return f"\0speed-async-weights-{token}"
