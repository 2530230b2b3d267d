"""The ipc backend: sockets and shared memory between members on one machine."""

import json
import os
import socket
import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore, TCPStore

from speed_async.errors import WeightSyncError
from speed_async.types import WeightOffer
from speed_async.weight_sync import ipc_group
from speed_async.weight_sync.ipc_group import HEADER, SOCKET_KEY, Kind, host_ipc, join_ipc
from speed_async.weight_sync.shared_memory import MemoryRefused, make_memory, open_memory
from tests.fakes.weights_contract import Loaded, TorchEndpoints, attempt, open_channel

CPU = torch.device("cpu")
JOIN_S = 30.0
DESCRIPTION = {"device": "cpu", "num_bytes": 4096}


def make_offer(**changes: object) -> WeightOffer:
    offer = WeightOffer(
        policy_version=1,
        epoch=1,
        rank=0,
        world_size=2,
        store_host="127.0.0.1",
        store_port=1,
        backend="ipc",
        deadline_s=10.0,
    )
    return replace(offer, **changes)


def test_the_error_of_a_receiver_on_another_machine_names_the_setting():
    with open_channel(TorchEndpoints("ipc", 1024)) as channel:
        host, port = channel.sender.store_address
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=JOIN_S))
        other_machine = json.dumps({"boot": "another", "host": "node7"})
        store.set("epoch-1/joined/0/1", other_machine)
        started_s = time.monotonic()
        with pytest.raises(WeightSyncError) as caught:
            channel.sender.send(channel.offer(1), [("w", torch.ones(4))])
        assert time.monotonic() - started_s < 5.0
        error = str(caught.value)
        assert "rank 1 runs on 'node7'" in error and "one machine" in error
        assert "set weights.backend = 'gloo' or 'nccl'" in error
        assert "rank 1 runs on 'node7'" in store.get("epoch-1/go").decode()  # read by the receiver


def test_connections_that_are_not_members_are_closed():
    store = HashStore()
    outcomes: dict[int, object] = {}

    def host() -> None:
        outcomes[0] = host_ipc(store, make_offer())

    thread = threading.Thread(target=host)
    thread.start()
    address = f"\0speed-async-weights-{store.get(SOCKET_KEY).decode()}"
    frames = [HEADER.pack(Kind.HELLO, 2), HEADER.pack(99, 1), HEADER.pack(Kind.TAKEN, 0), b""]
    for frame in frames:  # unknown rank, unknown kind, not a HELLO, empty
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(address)
            connection.sendall(frame)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
    receiver = join_ipc(store, make_offer(rank=1))
    thread.join(JOIN_S)
    sender = outcomes[0]
    assert isinstance(sender, ipc_group.IpcGroup)
    sender.broadcast(torch.tensor([1, 2, 3], dtype=torch.uint8), 5.0)
    message_B = torch.zeros(3, dtype=torch.uint8)
    receiver.broadcast(message_B, 5.0)
    assert message_B.tolist() == [1, 2, 3]
    sender.abort()
    with pytest.raises(RuntimeError, match="rank 0: closed its connection"):
        receiver.broadcast(message_B, 5.0)
    receiver.abort()


def test_a_rank_that_never_connects_is_named():
    with pytest.raises(RuntimeError, match="no connection from rank 1, 2"):
        host_ipc(HashStore(), make_offer(world_size=3, deadline_s=0.2))


def test_a_stale_socket_name_raises():
    store = HashStore()
    store.set(SOCKET_KEY, "0" * 32)
    with pytest.raises(RuntimeError, match=r"rank 0 cannot be reached .* one machine"):
        join_ipc(store, make_offer(rank=1))


def test_an_oversized_frame_is_rejected():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(HEADER.pack(Kind.MESSAGE, 2**40))
        group = ipc_group.IpcGroup({0: ours})
        with pytest.raises(RuntimeError, match="rank 0: announced 1099511627776 bytes"):
            group.receive(0, 5.0)


def memory_description(**changes: object) -> bytes:
    return json.dumps(DESCRIPTION | changes).encode()


def test_shared_memory_is_shared_and_cannot_shrink():
    descriptor = make_memory(2 * 4096)
    ours = open_memory(memory_description(), os.dup(descriptor), CPU)
    theirs = open_memory(memory_description(), os.dup(descriptor), CPU)
    ours[1].fill_(7)
    assert theirs[1].eq(7).all() and theirs[0].eq(0).all()
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 4096)
    os.close(descriptor)
    assert theirs[1].eq(7).all()  # open mappings keep the memory


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (memory_description(num_bytes=4097), "smaller than its description"),
        (memory_description(num_bytes=-1), "smaller than its description"),
        (memory_description(device="tpu"), "malformed"),
        (b"\x80\x04N.", "cannot be opened"),
        (json.dumps({"device": "cuda", "gpu": "x", "buffers": [[], []]}).encode(), "on a GPU"),
    ],
)
def test_memory_that_does_not_match_its_description_is_refused(payload: bytes, message: str):
    with pytest.raises(MemoryRefused, match=message):
        open_memory(payload, make_memory(2 * 4096), CPU)


def test_memory_that_could_shrink_is_refused():
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 2 * 4096)
    with pytest.raises(MemoryRefused, match="not sealed"):
        open_memory(memory_description(), descriptor, CPU)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_receiver_reports_why_it_cannot_open_the_memory():
    """The actor is on the CPU and the learner shares GPU memory. The actor reports the error to the
    learner, as any error after an accepted manifest."""
    with open_channel(TorchEndpoints("ipc", 1024)) as channel:
        tensors = [("w", torch.ones(4))]
        first = channel.transfer(channel.offer(1), tensors, {1: tensors}, {1: Loaded().load})
        assert not any(isinstance(outcome, Exception) for outcome in first.values())
        group = channel.sender._membership._group  # type: ignore[attr-defined]
        outcomes: dict[int, object] = {}
        theirs = channel.offer(2, 1)
        thread = threading.Thread(
            target=attempt,
            args=(
                outcomes,
                1,
                lambda: channel.receiver(1).receive(theirs, tensors, Loaded().load),
            ),
        )
        thread.start()
        # The frame that a learner on a GPU sends before the first bucket.
        group.ipc.buffers_B = []
        gpu = {"device": "cuda", "gpu": "x", "buffers": [[], []]}
        send_memory = group.ipc.send_memory
        group.ipc.send_memory = lambda _, __, deadline_s: send_memory(gpu, None, deadline_s)
        attempt(outcomes, 0, lambda: channel.sender.send(channel.offer(2), tensors))
        thread.join(JOIN_S)
    assert "set actors.device = 'cuda', or weights.backend = 'gloo'" in str(outcomes[1])
    assert "the learner's weights are on a GPU" in str(outcomes[1])
