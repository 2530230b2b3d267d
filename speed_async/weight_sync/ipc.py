"""The ipc backend: buffers shared by all ranks of one machine, and sockets that order their use.

The sender packs directly into the buffers and receivers load directly from them. The manifest
describes the memory (see `shared_memory.py`); its file descriptor is sent over the sockets.

The sockets are Unix sockets in the abstract namespace. They need no cleanup after a crash, and the
exit of one process is detected by its peer at once. The secret socket name is sent through the
store; both peers verify that the other process has the same user. Each message is one byte: the
sender has filled the next buffer, or a receiver has loaded it. Streams are synchronised on the host
before either side sends, so no CUDA events are needed.

Shape legend: B bytes of one bucket.
"""

import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from speed_async.errors import WeightSyncError
from speed_async.types import WeightOffer
from speed_async.weight_sync.buckets import NUM_BUFFERS, Bucket, largest_bytes
from speed_async.weight_sync.process_group import MemberLeft
from speed_async.weight_sync.shared_memory import (
    describe_on_gpu,
    make_memory,
    map_memory,
    open_memory,
)

PEER_CREDENTIALS = struct.Struct("3i")  # SO_PEERCRED: process, user, group
SOCKET_KEY = "socket"
ONE_MACHINE = (
    "backend 'ipc' needs the learner and its actors on one machine, in one network namespace and"
    " under one user; set weights.backend = 'gloo' or 'nccl'"
)


class IpcTransport:
    """Transfers buckets through shared memory. Failures are RuntimeErrors that name the rank."""

    def __init__(
        self, sockets: dict[int, socket.socket], offer: WeightOffer, device: torch.device
    ) -> None:
        """`sockets`: those of all receivers by rank, or that of rank 0."""
        self._memory: object = None
        """Description of the shared memory, as in the manifest."""
        self._sockets = sockets
        self._device = device
        self._deadline_s = offer.deadline_s
        self._buffers_B: list[Tensor] = []
        self._num_sent = 0
        self._num_sent_at = [0] * NUM_BUFFERS
        """For each buffer, the number of buckets sent up to and including its last use."""
        self._num_loaded = dict.fromkeys(sockets, 0)

    def begin_sending(self, buckets: Sequence[Bucket], deadline_s: float) -> object:
        """Sender: starts a transfer. Allocates memory if necessary and sends its descriptor.
        Returns its description for the receivers."""
        self._deadline_s = deadline_s
        num_bytes = max(largest_bytes(buckets), 1)
        if self._buffers_B and self._buffers_B[0].numel() >= num_bytes:
            return self._memory
        self._await_loaded(self._num_sent)  # receivers may still use the previous memory
        if self._device.type == "cuda":
            self._buffers_B = [
                torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
                for _ in range(NUM_BUFFERS)
            ]
            self._memory = describe_on_gpu(self._buffers_B)
            return self._memory
        descriptor = make_memory(num_bytes * NUM_BUFFERS)
        try:
            self._buffers_B = map_memory(descriptor, num_bytes)
            self._memory = {"device": "cpu", "num_bytes": num_bytes}
            self._signal([descriptor])
        finally:
            os.close(descriptor)
        return self._memory

    def begin_receiving(self, buckets: Sequence[Bucket], deadline_s: float, memory: object) -> None:
        """Receiver: starts a transfer. Opens the sender's memory, unless it is open already.
        Raises WeightSyncError when this is not possible."""
        self._deadline_s = deadline_s
        if memory != self._memory:
            descriptors: list[int] = []
            if isinstance(memory, dict) and memory.get("device") == "cpu":
                _, descriptors = self._receive(0, 1, "sent no memory")
            self._buffers_B = open_memory(memory, descriptors, self._device)
            self._memory = memory
        if not self._buffers_B or largest_bytes(buckets) > self._buffers_B[0].numel():
            raise WeightSyncError("rank 0 shares less memory than a bucket requires")

    def can_send(self, packed_B: Tensor) -> bool:
        return False

    def acquire(self, index: int) -> Tensor:
        """Sender: a buffer for this bucket, at least (B,) uint8; waits until one is free."""
        self._await_loaded(self._num_sent_at[index % NUM_BUFFERS])
        return self._buffers_B[index % NUM_BUFFERS]

    def send(self, index: int, packed_B: Tensor) -> None:
        """Sender: announces the acquired buffer."""
        self._signal()
        self._num_sent += 1
        self._num_sent_at[index % NUM_BUFFERS] = self._num_sent

    def finish(self) -> None:
        """Sender: a no-op, because receivers may load the last buckets while it continues."""

    def take(self, index: int) -> Tensor:
        """Receiver: this bucket, at least (B,) uint8, valid until released."""
        self._receive(0, 1, "sent nothing")
        return self._buffers_B[index % NUM_BUFFERS]

    def release(self) -> None:
        """Receiver: reports that the bucket is loaded."""
        self._signal()

    def abort(self) -> None:
        """Closes every connection, which wakes waiting peers."""
        for peer in self._sockets.values():
            peer.close()

    def _await_loaded(self, num_buckets: int) -> None:
        """Sender: waits until every receiver has loaded this number of buckets of the epoch."""
        for rank in self._sockets:
            while self._num_loaded[rank] < num_buckets:
                received, _ = self._receive(rank, NUM_BUFFERS, "did not load an earlier bucket")
                self._num_loaded[rank] += len(received)

    def _signal(self, descriptors: Sequence[int] = ()) -> None:
        for rank, peer in self._sockets.items():
            peer.settimeout(self._deadline_s)
            try:
                socket.send_fds(peer, [b"\0"], descriptors)
            except TimeoutError as error:
                raise RuntimeError(f"rank {rank} does not read its socket") from error
            except OSError as error:
                raise RuntimeError(f"rank {rank} closed its connection") from error

    def _receive(self, rank: int, max_bytes: int, absence: str) -> tuple[bytes, list[int]]:
        """At most this number of messages, and the file descriptor that one of them contains."""
        peer = self._sockets[rank]
        peer.settimeout(self._deadline_s)
        try:
            received, descriptors, _, _ = socket.recv_fds(
                peer, max_bytes, 1, socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError as error:
            raise RuntimeError(f"rank {rank} {absence}") from error
        except OSError as error:
            raise RuntimeError(f"rank {rank}: {error}") from error
        if not received:
            raise RuntimeError(f"rank {rank} closed its connection")
        return received, descriptors


# --- rendezvous ---------------------------------------------------------------------------------


def machine_identity() -> str:
    """Host name and identity of this machine until its next boot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {socket.gethostname()}"


def machine_mismatches(identities: Mapping[int, str]) -> dict[int, str]:
    """`identities`: by rank. Why members cannot take part, by rank: they run on another machine
    than rank 0."""
    parts = {rank: identity.partition(" ") for rank, identity in identities.items()}
    boot, _, host = parts[0]
    return {
        rank: f"runs on '{their_host}' and rank 0 on '{host}': {ONE_MACHINE}"
        for rank, (their_boot, _, their_host) in parts.items()
        if their_boot != boot
    }


def host_sockets(store: Store, offer: WeightOffer) -> dict[int, socket.socket]:
    """Sender: connections of all receivers, by rank. Raises MemberLeft at the deadline."""
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
                raise MemberLeft(missing, "did not connect to rank 0") from error
            rank = _first_message(peer, deadline)
            if rank in missing:
                sockets[rank] = peer
            else:
                peer.close()
    return sockets


def join_sockets(store: Store, offer: WeightOffer) -> dict[int, socket.socket]:
    """Receiver: connects to the sender. Raises RuntimeError."""
    token = store.get(SOCKET_KEY).decode(errors="replace")
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.settimeout(offer.deadline_s)
        peer.connect(_address(token))
        if not _is_same_user(peer):
            raise PermissionError("it belongs to another user")
        peer.sendall(RANK.pack(offer.rank))
    except OSError as error:
        peer.close()
        raise RuntimeError(f"rank 0 cannot be reached ({error}): {ONE_MACHINE}") from error
    return {0: peer}


RANK = struct.Struct("<I")
"""The first message of a receiver."""


def _first_message(peer: socket.socket, deadline: float) -> int | None:
    """The rank of the peer; None for a peer that is not a member."""
    peer.settimeout(max(deadline - time.monotonic(), 0.001))
    try:
        message = peer.recv(RANK.size, socket.MSG_WAITALL) if _is_same_user(peer) else b""
    except OSError:
        return None
    return RANK.unpack(message)[0] if len(message) == RANK.size else None


def _is_same_user(peer: socket.socket) -> bool:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    return PEER_CREDENTIALS.unpack(credentials)[1] == os.geteuid()


def _address(token: str) -> str:
    return f"\0speed-async-weights-{token}"
