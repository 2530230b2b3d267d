"""NCCL groups on a machine without GPUs: the process group and the identity of a GPU are
replaced."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speed_async.errors import ConfigError, WeightSyncError
from speed_async.launch import run_rank
from speed_async.launcher.nccl_environment import nccl_environment
from speed_async.launcher.rank import Node
from speed_async.launcher.roles import learner_role
from speed_async.launcher.roles.engine_environment import engine_environment
from speed_async.weight_sync import epoch_group
from speed_async.weight_sync.channel import NamedTensor, TransferReport
from speed_async.weight_sync.float_dtypes import encode_dtypes, float_dtypes
from speed_async.weight_sync.process_group import reach_store
from tests.fakes.learner_samples import make_config
from tests.fakes.weights_contract import (
    Channel,
    Loaded,
    TorchEndpoints,
    assert_arrived,
    open_channel,
)

DEADLINE_S = 1.0
LONG_S = 60.0
STATED = encode_dtypes(float_dtypes([("w", torch.ones(3))]))


@dataclass
class Peers:
    """State that the members of one group share: they are threads of this process."""

    options: list[Any] = field(default_factory=list)
    aborted: set[int] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)
    arrived: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)


class Work:
    def __init__(self, peers: Peers, operation: int, size: int) -> None:
        self._peers, self._operation, self._size = peers, operation, size

    def is_completed(self) -> bool:
        buffers = self._peers.arrived[self._operation]
        if len(buffers) < self._size:
            return False
        for buffer in buffers.values():
            buffer.copy_(buffers[0])
        return True

    def wait(self, timeout: timedelta) -> None:
        assert self.is_completed()


def stub_of(peers: Peers) -> Any:
    """A process group class whose operations complete when all ranks have started them. The first
    one blocks in the call, as the creation of a communicator does."""

    class Group:
        class Options:
            def __init__(self) -> None:
                self.config = SimpleNamespace(blocking=-1)

        def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
            peers.options.append(options)
            self._rank, self._size, self._num_operations = rank, size, 0

        def broadcast(self, buffer: torch.Tensor, root: int, timeout: timedelta) -> Work:
            operation = self._num_operations
            self._num_operations += 1
            with peers.changed:
                peers.arrived.setdefault(operation, {})[self._rank] = buffer
                peers.changed.notify_all()
                if operation == 0:
                    started = peers.arrived[0]
                    peers.changed.wait_for(
                        lambda: len(started) == self._size or self._rank in peers.aborted
                    )
            return Work(peers, operation, self._size)

        def abort(self) -> None:
            with peers.changed:
                peers.aborted.add(self._rank)
                peers.changed.notify_all()

    return Group


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peers]:
    shared = Peers()
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", stub_of(shared), raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(epoch_group, "gpu_identity", lambda device: f"GPU-{device.index}")
    yield shared


@pytest.fixture
def channel(peers: Peers) -> Iterator[Channel]:
    opened = Channel(TorchEndpoints("nccl", 1024, devices=[f"cpu:{gpu}" for gpu in range(4)]))
    yield opened
    opened.close()


def run_transfer(channel: Channel, version: int, loaded: dict[int, Loaded]) -> dict[int, Any]:
    tensors = [("w", torch.arange(8.0)), ("b", torch.ones(300))]
    return channel.transfer(
        channel.offer(version, world_size=len(loaded) + 1, deadline_s=DEADLINE_S),
        tensors,
        dict.fromkeys(loaded, tensors),
        {rank: each.load for rank, each in loaded.items()},
    )


def test_communicators_do_not_block_and_the_watchdog_is_the_last_to_expire(
    channel: Channel, peers: Peers
):
    loaded = {1: Loaded(), 2: Loaded()}
    outcomes = run_transfer(channel, 1, loaded)
    assert [type(outcome) for outcome in outcomes.values()] == [TransferReport] * 3, outcomes
    assert_arrived(loaded[1], [("w", torch.arange(8.0)), ("b", torch.ones(300))])
    assert [options.config.blocking for options in peers.options] == [0, 0, 0]
    assert {options._timeout for options in peers.options} == {timedelta(seconds=10 * DEADLINE_S)}


def test_a_member_that_dies_before_the_communicator_exists_is_named(channel: Channel, peers: Peers):
    offer = channel.offer(1, world_size=3, deadline_s=DEADLINE_S)
    reach_store(offer).set("epoch-1/joined/0/2", f"\n{STATED}")  # rank 2 then dies
    tensors = [("w", torch.ones(3))]
    loaded = Loaded()
    outcomes = channel.transfer(offer, tensors, {1: tensors}, {1: loaded.load})
    assert isinstance(outcomes[0], WeightSyncError) and isinstance(outcomes[1], WeightSyncError)
    assert outcomes[0].missing_ranks == (2,)
    assert "rendezvous failed" in str(outcomes[0])
    assert "no response from rank 2" in str(outcomes[0])
    assert "waiting for rank 0" in str(outcomes[1])
    assert loaded.tensors == {}
    with peers.changed:
        assert peers.changed.wait_for(lambda: peers.aborted == {0, 1}, LONG_S)


def test_a_member_that_stops_in_a_transfer_is_named_and_the_others_end_with_the_sender(
    channel: Channel, peers: Peers
):
    tensors = [(f"w{index}", torch.full((200,), index)) for index in range(6)]
    released, loaded = threading.Event(), Loaded()

    def stop(_: Sequence[NamedTensor]) -> None:
        released.wait(LONG_S)

    def receive() -> None:
        offer = channel.offer(1, 2, world_size=3, deadline_s=LONG_S)
        with suppress(WeightSyncError):
            channel.receiver(2).receive(offer, tensors, stop)

    errors: list[WeightSyncError] = []

    def receive_first() -> None:
        offer = channel.offer(1, 1, world_size=3, deadline_s=LONG_S)
        with pytest.raises(WeightSyncError) as caught:
            channel.receiver(1).receive(offer, tensors, loaded.load)
        errors.append(caught.value)

    threads = [threading.Thread(target=each) for each in (receive, receive_first)]
    for thread in threads:
        thread.start()
    try:
        with pytest.raises(WeightSyncError, match="no response from rank 2") as caught:
            channel.sender.send(channel.offer(1, world_size=3, deadline_s=DEADLINE_S), tensors)
    finally:
        released.set()
    for thread in threads:
        thread.join(LONG_S)
    assert caught.value.missing_ranks == (2,)
    assert "bucket" in str(caught.value)
    assert "the sender left the group" in str(errors[0])


@pytest.mark.parametrize(
    ("gpus", "missing", "message"),
    [
        ((0, 1, 1), (2,), "rank 2 uses the GPU of rank 1"),
        ((0, 0, 1), (1,), "rank 1 uses the GPU of rank 0"),
        ((0, 0, 0), (1, 2), "rank 2 uses the GPU of rank 0"),
    ],
)
def test_a_member_that_shares_a_gpu_is_named_at_once(
    peers: Peers, gpus: Sequence[int], missing: tuple[int, ...], message: str
):
    endpoints = TorchEndpoints("nccl", 1024, devices=[f"cpu:{gpu}" for gpu in gpus])
    with open_channel(endpoints) as channel:
        channel.receivers = {rank: endpoints.make_receiver() for rank in (1, 2)}
        loaded = {1: Loaded(), 2: Loaded()}
        outcomes = run_transfer(channel, 1, loaded)
    for outcome in outcomes.values():
        assert isinstance(outcome, WeightSyncError)
        assert message in str(outcome) and "set weights.backend = 'gloo'" in str(outcome)
    assert outcomes[0].missing_ranks == missing
    assert not peers.options  # no communicator was created


def test_an_actor_without_a_gpu_is_a_configuration_error():
    with open_channel(TorchEndpoints("nccl", 1024, devices=["cpu"] * 2)) as channel:
        offer = channel.offer(1, 1, deadline_s=LONG_S)
        with pytest.raises(ConfigError, match=r"'weights.backend' = 'nccl'.*uses 'cpu'.*'gloo'"):
            channel.receiver(1).receive(offer, [("w", torch.ones(3))], Loaded().load)


# --- the environment of processes ---------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_actors_do_not_inherit_the_error_handling_of_torchrun(tmp_path: Path, engine: Any):
    config = make_config(tmp_path)
    actors = config.actors.model_copy(update={"engine": engine})
    weights = config.weights.model_copy(update={"deadline_s": 12.5})
    environment = engine_environment(
        config.model_copy(update={"actors": actors, "weights": weights})
    )
    assert environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert environment["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert environment["TORCH_NCCL_NONBLOCKING_TIMEOUT"] == "13"


def test_a_learner_replaces_the_error_handling_of_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []

    async def lead_run(*_: object, **__: object) -> str:
        seen.append(os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"])
        return "completed"

    for name in nccl_environment(deadline_s=1.0):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(learner_role, "lead_run", lead_run)
    assert run_rank(make_config(tmp_path), Node(num_ranks=2).rank(0), resume=False) == 0
    assert seen == ["0"]
