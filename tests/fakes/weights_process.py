"""The peer of a transfer, in a separate process that may be killed or stopped.

`receive OFFERS FATAL_VERSION SIGNAL DEVICE` receives every offer in order, verifies the tensors,
and sends itself SIGNAL when it loads the first bucket of FATAL_VERSION. `send BACKEND NUM_VERSIONS
DEADLINE_S` prints its port and sends to one receiver.
"""

import json
import os
import sys
from collections.abc import Sequence

import torch

from speed_async.types import WeightBackend, WeightOffer
from speed_async.weight_sync.broadcast import TorchReceiver, TorchSender
from speed_async.weight_sync.channel import NamedTensor

NUM_BUCKETS = 6
BUCKET_BYTES = 1024 * 1024
CPU = torch.device("cpu")


def sample_weights(policy_version: int) -> list[NamedTensor]:
    """One tensor per bucket; its values identify the version and the tensor."""
    num_elements = BUCKET_BYTES // 4
    return [
        (f"layer.{index}", torch.full((num_elements,), float(10 * policy_version + index)))
        for index in range(NUM_BUCKETS)
    ]


def receive(offers: list[dict], fatal_version: int, signal_number: int, device: str) -> None:
    def kill_self(_: Sequence[NamedTensor]) -> None:
        os.kill(os.getpid(), signal_number)

    receiver = TorchReceiver(device=torch.device(device))
    for offer in (WeightOffer(**fields) for fields in offers):
        received: dict[str, torch.Tensor] = {}

        def keep(
            tensors: Sequence[NamedTensor], received: dict[str, torch.Tensor] = received
        ) -> None:
            received.update({name: tensor.to("cpu", copy=True) for name, tensor in tensors})

        load = kill_self if offer.policy_version == fatal_version else keep
        receiver.receive(offer, sample_weights(0), load)
        for name, tensor in sample_weights(offer.policy_version):
            assert torch.equal(received[name], tensor), name


def send(backend: WeightBackend, num_versions: int, deadline_s: float) -> None:
    sender = TorchSender(host="127.0.0.1", bucket_bytes=BUCKET_BYTES, device=CPU)
    host, port = sender.store_address
    print(port, flush=True)
    for policy_version in range(1, num_versions + 1):
        offer = WeightOffer(
            policy_version=policy_version,
            epoch=1,
            rank=0,
            world_size=2,
            store_host=host,
            store_port=port,
            backend=backend,
            deadline_s=deadline_s,
        )
        sender.send(offer, sample_weights(policy_version))


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["receive", offers, fatal_version, signal_number, device]:
            receive(json.loads(offers), int(fatal_version), int(signal_number), device)
        case ["send", "gloo" | "nccl" | "ipc" as backend, num_versions, deadline_s]:
            send(backend, int(num_versions), float(deadline_s))
