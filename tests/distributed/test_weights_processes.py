"""Members in separate processes, which are killed or stopped during a transfer; and GPUs."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch

from speed_async.errors import WeightSyncError
from speed_async.types import WeightBackend, WeightOffer
from speed_async.weight_sync.broadcast import TorchReceiver
from speed_async.weight_sync.channel import TransferReport
from tests.fakes import weights_process
from tests.fakes.paths import REPOSITORY
from tests.fakes.weights_contract import (
    Loaded,
    TorchEndpoints,
    assert_arrived,
    mixed_tensors,
    open_channel,
    send_to,
)

CHILD_STARTS_S = 60.0
CPU = torch.device("cpu")


@contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The peer of a transfer, killed at the end of the block, even when it is stopped."""
    command = [sys.executable, "-m", "tests.fakes.weights_process", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(CHILD_STARTS_S)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("fatal_signal", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_a_receiver_lost_during_a_transfer_is_named_and_the_next_epoch_works(
    backend: WeightBackend, fatal_signal: signal.Signals
):
    with open_channel(TorchEndpoints(backend, weights_process.BUCKET_BYTES)) as channel:
        first = channel.offer(1, world_size=3, deadline_s=CHILD_STARTS_S)
        second = channel.offer(2, world_size=3, deadline_s=1.5)
        offers = json.dumps([asdict(replace(offer, rank=2)) for offer in (first, second)])
        with child("receive", offers, "2", str(int(fatal_signal)), "cpu"):
            loaded = Loaded()
            ours = weights_process.sample_weights(1)
            outcomes = channel.transfer(first, ours, {1: ours}, {1: loaded.load})
            assert isinstance(outcomes[0], TransferReport), outcomes
            started_s = time.monotonic()
            ours = weights_process.sample_weights(2)
            outcomes = channel.transfer(second, ours, {1: ours}, {1: loaded.load})
            waited_s = time.monotonic() - started_s
            error = str(outcomes[0])
            assert isinstance(outcomes[0], WeightSyncError)
            assert "policy version 2, epoch 1, bucket" in error
            assert error.endswith("no response from rank 2")
            assert isinstance(outcomes[1], WeightSyncError)
            assert waited_s < 5.0
            # The stopped process keeps its connections open: nothing below may wait for it.
            third = channel.offer(3, epoch=2, deadline_s=5.0)
            ours = weights_process.sample_weights(3)
            assert_arrived(send_to(channel, third, ours)[1], ours)
            started_s = time.monotonic()
            channel.close()
            assert time.monotonic() - started_s < 2.5


def send_signal(process: subprocess.Popen[str], fatal_signal: signal.Signals) -> None:
    """Sends the signal, and returns when the process has stopped or exited."""
    os.kill(process.pid, fatal_signal)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("fatal_signal", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_a_receiver_that_loses_its_sender_joins_another(
    backend: WeightBackend, fatal_signal: signal.Signals
):
    receiver = TorchReceiver(device=CPU)
    expected = weights_process.sample_weights(0)
    with child("send", backend, "2", "60") as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], CHILD_STARTS_S)[0]
        offer = WeightOffer(
            policy_version=1,
            epoch=1,
            rank=1,
            world_size=2,
            store_host="127.0.0.1",
            store_port=int(process.stdout.readline()),
            backend=backend,
            deadline_s=20.0,
        )
        receiver.receive(offer, expected, Loaded().load)
        second = replace(offer, policy_version=2, deadline_s=1.5)
        started_s = time.monotonic()
        with pytest.raises(WeightSyncError, match=r"bucket \d of 6 failed .* waiting for rank 0"):
            receiver.receive(second, expected, lambda _: send_signal(process, fatal_signal))
        assert time.monotonic() - started_s < 5.0
        # A killed store refuses the connection; a stopped one accepts it and never responds.
        started_s = time.monotonic()
        with pytest.raises(WeightSyncError, match="epoch 2, rendezvous failed after"):
            receiver.receive(replace(second, epoch=2), expected, Loaded().load)
        assert time.monotonic() - started_s < 5.0
        with open_channel(TorchEndpoints(backend, weights_process.BUCKET_BYTES)) as channel:
            channel.receivers[1] = receiver
            ours = weights_process.sample_weights(3)
            third = channel.offer(3, epoch=3, deadline_s=5.0)
            assert_arrived(send_to(channel, third, ours)[1], ours)


# --- GPUs ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no GPU here")
def test_gloo_copies_gpu_tensors_through_host_memory():
    with open_channel(TorchEndpoints("gloo", 1024, devices=("cuda:0", "cuda:0"))) as channel:
        tensors = [(name, tensor.cuda()) for name, tensor in mixed_tensors()]
        for policy_version in (1, 2):
            loaded = send_to(channel, channel.offer(policy_version), tensors)
            assert_arrived(loaded[1], mixed_tensors())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each rank")
def test_nccl_moves_gpu_tensors_between_gpus():
    with open_channel(TorchEndpoints("nccl", 1024, devices=("cuda:0", "cuda:1"))) as channel:
        tensors = [(name, tensor.to("cuda:0")) for name, tensor in mixed_tensors()]
        for policy_version in (1, 2):
            loaded = send_to(channel, channel.offer(policy_version, deadline_s=60.0), tensors)[1]
            assert loaded.devices == {"cuda"}
            assert_arrived(loaded, mixed_tensors())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="CUDA IPC needs a GPU")
def test_gpu_memory_is_shared_with_another_process():
    endpoints = TorchEndpoints("ipc", weights_process.BUCKET_BYTES, devices=("cuda:0",))
    with open_channel(endpoints) as channel:
        offers = [channel.offer(version, deadline_s=CHILD_STARTS_S) for version in (1, 2, 3)]
        theirs = json.dumps([asdict(replace(offer, rank=1)) for offer in offers])
        with child("receive", theirs, "0", "0", "cuda:0") as process:
            for offer in offers:
                weights = weights_process.sample_weights(offer.policy_version)
                on_gpu = [(name, tensor.cuda()) for name, tensor in weights]
                channel.sender.send(offer, on_gpu)
            assert process.wait(CHILD_STARTS_S) == 0  # it has compared all tensors
