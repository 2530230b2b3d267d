"""Faults between a sender and the torch engine's model that only the digest detects.

The real sender and receiver transfer all weights over gloo. Each fault is made in the parameters of
the receiver, after its load and before its verification.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from speed_async.actors.torch_engine.slot_model import SlotModel
from speed_async.errors import WeightSyncError
from speed_async.types import WeightOffer
from speed_async.weight_sync.broadcast import TorchReceiver, TorchSender
from speed_async.weight_sync.canary_check import Canary
from speed_async.weight_sync.channel import LoadTensors, NamedTensor, TransferReport
from tests.fakes.tiny_models import tiny_model

CPU = torch.device("cpu")
Fault = Callable[[dict[str, Tensor]], object]


class FaultyReceiver(TorchReceiver):
    """Changes the parameters that it has received."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(device=CPU, in_place=True)
        self._fault = fault

    def receive(
        self, offer: WeightOffer, expected: Sequence[NamedTensor], load: LoadTensors
    ) -> TransferReport:
        report = super().receive(offer, expected, load)
        self._fault(dict(expected))
        return report


@pytest.fixture
def sender() -> Iterator[TorchSender]:
    sender = TorchSender(host="127.0.0.1", bucket_bytes=8192, device=CPU)
    yield sender
    sender.close()


def transfer(
    sender: TorchSender,
    sent: Any,
    held: Any,
    fault: Fault,
    canary: Canary | None = None,
    *,
    epoch: int = 1,
) -> None:
    """Sends all parameters of one model to another one, which verifies them."""
    host, port = sender.store_address
    offer = WeightOffer(
        policy_version=3,
        epoch=epoch,
        rank=0,
        world_size=2,
        store_host=host,
        store_port=port,
        backend="gloo",
        deadline_s=30.0,
    )
    named = [(name, each.detach()) for name, each in sent.named_parameters()]
    thread = Thread(target=lambda: sender.send(offer, named, canary))
    thread.start()
    receiver = FaultyReceiver(fault)
    model = SlotModel(held, num_slots=1)
    try:
        model.load(replace(offer, rank=1), receiver)
    finally:
        thread.join(30)
        receiver.close()
        assert model.has_valid_weights == (fault is no_fault)


def no_fault(held: dict[str, Tensor]) -> None: ...


def canary_of(model: Any, token_ids: tuple[int, ...]) -> Canary:
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([token_ids])).logits[0, :-1].float()
    targets_N = torch.tensor(token_ids[1:])
    logprobs_N = logits_TV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0]
    return Canary(token_ids=token_ids, logprobs=tuple(logprobs_N.tolist()))


def add_one_ulp(tensor: Tensor) -> None:
    """To the last element."""
    bits = {4: torch.int32, 2: torch.int16}[tensor.itemsize]
    tensor.view(-1).view(bits)[-1] += 1


def transpose(tensor: Tensor) -> None:
    tensor.copy_(tensor.t().clone())


def swap(first: Tensor, second: Tensor) -> None:
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


FAULTS: dict[str, tuple[Fault, str]] = {
    "one ulp": (
        lambda held: add_one_ulp(held["model.layers.1.mlp.up_proj.weight"]),
        r"1 of 21 .* first 'model\.layers\.1\.mlp\.up_proj",
    ),
    "transposed": (
        lambda held: transpose(held["model.layers.0.self_attn.o_proj.weight"]),
        r"1 of 21 .* first 'model\.layers\.0\.self_attn\.o_proj",
    ),
    "swapped": (
        lambda held: swap(
            held["model.layers.0.mlp.gate_proj.weight"], held["model.layers.0.mlp.up_proj.weight"]
        ),
        r"2 of 21 .* first 'model\.layers\.0\.mlp\.gate_proj",
    ),
    "untied head": (
        lambda held: held["lm_head.weight"].copy_(held["model.embed_tokens.weight"]),
        r"1 of 21 .* first 'lm_head",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_in_the_held_weights_is_refused(
    sender: TorchSender, fault: str, dtype: torch.dtype
) -> None:
    sent = tiny_model("llama", tied=False, seed=1)
    held = tiny_model("llama", tied=False).to(dtype)
    inject, message = FAULTS[fault]
    expected = rf"version 3 is refused, its digest failed: {message}"
    with pytest.raises(WeightSyncError, match=expected):
        transfer(sender, sent, held, inject)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_without_a_fault_are_accepted(sender: TorchSender, dtype: torch.dtype) -> None:
    sent = tiny_model("llama", tied=False, seed=1)
    held = tiny_model("llama", tied=False).to(dtype)
    transfer(sender, sent, held, no_fault, canary_of(sent, (4, 9, 30)))
    for (name, ours), theirs in zip(held.named_parameters(), sent.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(dtype)), name


def test_a_stale_tensor_that_the_canary_accepts_is_refused(sender: TorchSender) -> None:
    """As after an update with a small learning rate: the stale tensor differs in one element."""
    sent = tiny_model("llama", tied=True, seed=1).to(torch.bfloat16)
    stale = copy.deepcopy(sent)
    name = "model.layers.0.self_attn.q_proj.weight"
    add_one_ulp(sent.get_parameter(name).detach())
    canary = canary_of(sent, (4, 9, 30))
    held = tiny_model("llama", tied=True).to(torch.bfloat16)
    with pytest.raises(WeightSyncError, match=rf"digest failed: 1 of 20 .* first '{name}'"):
        transfer(
            sender, sent, held, lambda held: held[name].copy_(stale.get_parameter(name)), canary
        )
    transfer(sender, stale, held, no_fault, canary, epoch=2)  # the canary sees no difference


def test_a_wrong_expert_that_the_canary_is_not_routed_to_is_refused(sender: TorchSender) -> None:
    sent = tiny_model("qwen3_moe", tied=True, seed=1)
    canary = canary_of(sent, (4, 9, 30))  # three tokens reach at most three of eight experts
    name = "model.layers.1.mlp.experts.down_proj"
    wrong, expert = with_one_unused_expert_zeroed(sent, name, canary)

    def zero(held: dict[str, Tensor]) -> None:
        held[name][expert] = 0.0

    held = tiny_model("qwen3_moe", tied=True)
    with pytest.raises(WeightSyncError, match=rf"digest failed: 1 of \d+ .* first '{name}'"):
        transfer(sender, sent, held, zero, canary)
    transfer(sender, wrong, held, no_fault, canary, epoch=2)  # the canary sees no difference


def with_one_unused_expert_zeroed(model: Any, name: str, canary: Canary) -> tuple[Any, int]:
    for expert in range(8):
        wrong = copy.deepcopy(model)
        wrong.get_parameter(name).detach()[expert] = 0.0
        if canary_of(wrong, canary.token_ids) == canary:
            return wrong, expert
    raise AssertionError("the canary reaches all experts")
