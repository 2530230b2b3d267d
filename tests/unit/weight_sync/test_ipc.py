"""The ipc backend: sockets and shared memory between members on one machine."""

import os
import socket
import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from torch._C._distributed_c10d import HashStore, Store, TCPStore

from speed_async.errors import WeightSyncError
from speed_async.types import WeightOffer
from speed_async.weight_sync import epoch_group
from speed_async.weight_sync.buckets import plan_buckets
from speed_async.weight_sync.ipc import (
    RANK,
    SOCKET_KEY,
    IpcTransport,
    host_sockets,
    join_sockets,
)
from speed_async.weight_sync.manifest import describe
from speed_async.weight_sync.process_group import MemberLeft
from speed_async.weight_sync.shared_memory import make_memory, open_memory
from tests.fakes.weights_contract import Loaded, TorchEndpoints, open_channel

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
        store.set("epoch-1/joined/0/1", "another-boot node7")
        started_s = time.monotonic()
        with pytest.raises(WeightSyncError) as caught:
            channel.sender.send(channel.offer(1), [("w", torch.ones(4))])
        assert time.monotonic() - started_s < 5.0
        error = str(caught.value)
        assert "rank 1 runs on 'node7'" in error and "one machine" in error
        assert "set weights.backend = 'gloo' or 'nccl'" in error
        assert caught.value.missing_ranks == (1,)
        assert "rank 1 runs on 'node7'" in store.get("epoch-1/go").decode()  # read by the receiver


def test_a_receiver_in_another_network_namespace_is_named_and_the_other_is_not(
    monkeypatch: pytest.MonkeyPatch,
):
    def join(store: Store, offer: WeightOffer) -> dict[int, socket.socket]:
        if offer.rank == 2:  # a name that has no socket in its namespace
            store = HashStore()
            store.set(SOCKET_KEY, "0" * 32)
        return join_sockets(store, offer)

    monkeypatch.setattr(epoch_group, "join_sockets", join)
    tensors, loaded = [("w", torch.ones(4))], Loaded()
    with open_channel(TorchEndpoints("ipc", 1024)) as channel:
        offer = channel.offer(1, world_size=3, deadline_s=1.0)
        loads = {1: loaded.load, 2: loaded.load}
        outcomes = channel.transfer(offer, tensors, {1: tensors, 2: tensors}, loads)
    assert "rank 0 cannot be reached" in str(outcomes[2]) and "one machine" in str(outcomes[2])
    assert isinstance(outcomes[0], WeightSyncError) and outcomes[0].missing_ranks == (2,)
    assert "rank 2 did not connect" in str(outcomes[0])
    assert loaded.tensors == {}


def test_connections_that_are_not_members_are_closed():
    store = HashStore()
    outcomes: dict[int, IpcTransport] = {}

    def host() -> None:
        outcomes[0] = IpcTransport(host_sockets(store, make_offer()), make_offer(), CPU)

    thread = threading.Thread(target=host)
    thread.start()
    address = f"\0speed-async-weights-{store.get(SOCKET_KEY).decode()}"
    for message in (RANK.pack(2), RANK.pack(0), b"\1", b""):  # unknown ranks, incomplete, empty
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(address)
            connection.sendall(message)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
    receiver = IpcTransport(join_sockets(store, make_offer(rank=1)), make_offer(rank=1), CPU)
    thread.join(JOIN_S)
    sender = outcomes[0]
    buckets = plan_buckets(describe([("w", torch.ones(3, dtype=torch.uint8))]), 64)
    receiver.begin_receiving(buckets, 5.0, sender.begin_sending(buckets, 5.0))
    buffer_B = sender.acquire(0)
    buffer_B.copy_(torch.tensor([1, 2, 3], dtype=torch.uint8))
    sender.send(0, buffer_B)
    assert receiver.take(0).tolist() == [1, 2, 3]
    sender.abort()
    with pytest.raises(RuntimeError, match="rank 0 closed its connection"):
        receiver.take(1)
    receiver.abort()


def test_a_rank_that_never_connects_is_named():
    with pytest.raises(MemberLeft, match="ranks 1, 2 did not connect") as caught:
        host_sockets(HashStore(), make_offer(world_size=3, deadline_s=0.2))
    assert caught.value.ranks == (1, 2)


def test_a_stale_socket_name_raises():
    store = HashStore()
    store.set(SOCKET_KEY, "0" * 32)
    with pytest.raises(RuntimeError, match=r"rank 0 cannot be reached .* one machine"):
        join_sockets(store, make_offer(rank=1))


def test_shared_memory_is_shared_and_cannot_shrink():
    descriptor = make_memory(2 * 4096)
    ours = open_memory(DESCRIPTION, [os.dup(descriptor)], CPU)
    theirs = open_memory(DESCRIPTION, [os.dup(descriptor)], CPU)
    ours[1].fill_(7)
    assert theirs[1].eq(7).all() and theirs[0].eq(0).all()
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 4096)
    os.close(descriptor)
    assert theirs[1].eq(7).all()  # open mappings keep the memory


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (DESCRIPTION | {"num_bytes": 4097}, "smaller than its description"),
        (DESCRIPTION | {"num_bytes": -1}, "smaller than its description"),
        (DESCRIPTION | {"device": "tpu"}, "malformed"),
        (None, "malformed"),
        ({"device": "cuda", "gpu": "x", "buffers": [[], []]}, "on a GPU"),
    ],
)
def test_memory_that_does_not_match_its_description_is_refused(memory: object, message: str):
    with pytest.raises(WeightSyncError, match=message):
        open_memory(memory, [make_memory(2 * 4096)], CPU)


def test_memory_that_could_shrink_is_refused():
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 2 * 4096)
    with pytest.raises(WeightSyncError, match="not sealed"):
        open_memory(DESCRIPTION, [descriptor], CPU)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_receiver_reports_why_it_cannot_open_the_memory(monkeypatch: pytest.MonkeyPatch):
    """The actor is on the CPU and the learner shares GPU memory. Both sides report the reason."""
    gpu = {"device": "cuda", "gpu": "x", "buffers": [[], []]}
    with open_channel(TorchEndpoints("ipc", 1024)) as channel:
        tensors = [("w", torch.ones(4))]
        first = channel.transfer(channel.offer(1), tensors, {1: tensors}, {1: Loaded().load})
        assert not any(isinstance(outcome, Exception) for outcome in first.values())
        monkeypatch.setattr(IpcTransport, "begin_sending", lambda *_: gpu)
        second = channel.transfer(channel.offer(2), tensors, {1: tensors}, {1: Loaded().load})
    for outcome in (second[0], second[1]):
        assert "set actors.device = 'cuda', or weights.backend = 'gloo'" in str(outcome)
        assert "the learner's weights are on a GPU" in str(outcome)
    assert isinstance(second[0], WeightSyncError) and second[0].missing_ranks == (1,)
