"""Contiguous weights are sent without packing and received in place."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from speed_async.errors import WeightSyncError
from speed_async.types import WeightBackend
from speed_async.weight_sync.buckets import contiguous_view, flatten_parameters, plan_buckets
from speed_async.weight_sync.channel import NamedTensor, TransferReport
from speed_async.weight_sync.manifest import describe
from tests.fakes.weights_contract import TorchEndpoints, open_channel, same_bits

BUCKET_BYTES = 1024


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, 6)  # 1,200 bytes: larger than a bucket
        self.norm = nn.LayerNorm(5)  # 20 bytes each, followed by a gap
        self.half = nn.Linear(6, 5, dtype=torch.bfloat16)
        self.head = nn.Linear(6, 50, bias=False)
        self.head.weight = self.embed.weight


def named(model: nn.Module) -> list[NamedTensor]:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in named(model)}


def test_flatten_parameters_keeps_values_ties_and_optimisers():
    flat, plain = Tied(1), Tied(1)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (flat, plain)]
    # 1,200, then 20 -> 32 twice, 60 -> 64, 10 -> 16.
    assert flatten_parameters(flat) == 1200 + 32 + 32 + 64 + 16
    assert flat.head.weight is flat.embed.weight
    for model, optimizer in zip((flat, plain), optimizers, strict=True):
        model.head(model.embed(torch.tensor([3, 7]))).square().sum().backward()
        optimizer.step()
    for (_, ours), (_, theirs) in zip(named(flat), named(plain), strict=True):
        assert same_bits(ours, theirs)
    assert len({tensor.untyped_storage().data_ptr() for _, tensor in named(flat)}) == 1


def test_parameters_that_share_a_storage_are_not_moved():
    both = torch.ones(2, 8)
    model = nn.ParameterList([nn.Parameter(both[0]), nn.Parameter(both[1])])
    assert flatten_parameters(model) == 0
    assert model[0].data_ptr() == both.data_ptr()


def test_contiguous_view_requires_the_layout_of_the_bucket():
    model = Tied(2)
    scattered = dict(named(model))
    plan = plan_buckets(describe(list(scattered.items())), BUCKET_BYTES)
    assert [len(bucket.tensors) for bucket in plan] == [1, 4]
    assert contiguous_view(plan[1], scattered) is None
    flatten_parameters(model)
    flat = dict(named(model))
    for bucket in plan:
        view_B = contiguous_view(bucket, flat)
        assert view_B is not None and view_B.shape == (bucket.num_bytes,)
        assert view_B.data_ptr() == flat[bucket.tensors[0].spec.name].data_ptr()
    transposed = flat | {"half.weight": flat["half.weight"].clone().t().contiguous().t()}
    assert contiguous_view(plan[1], transposed) is None
    assert contiguous_view(plan[1], flat | {"norm.bias": flat["norm.weight"]}) is None
    assert (
        contiguous_view(plan[1], flat | {"norm.bias": flat["norm.bias"].view(torch.int32)}) is None
    )


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
@pytest.mark.parametrize("sender_is_flat", [True, False])
def test_flat_weights_are_received_in_place(backend: WeightBackend, sender_is_flat: bool):
    learner, actor = Tied(3), Tied(4)
    flatten_parameters(actor)
    if sender_is_flat:
        flatten_parameters(learner)
    theirs = copies(learner)
    expected = named(actor)
    loaded_names: list[list[str]] = []

    def load(tensors: Sequence[NamedTensor]) -> None:
        if not loaded_names:  # before the first write
            assert tensors == [] and not same_bits(actor.embed.weight, theirs["embed.weight"])
        loaded_names.append([name for name, _ in tensors])
        for name, tensor in tensors:
            assert tensor is dict(expected)[name]  # not a copy
            assert same_bits(tensor, theirs[name])

    with open_channel(TorchEndpoints(backend, BUCKET_BYTES, in_place=True)) as channel:
        for policy_version in (1, 2):
            loaded_names.clear()
            outcomes = channel.transfer(
                channel.offer(policy_version), named(learner), {1: expected}, {1: load}
            )
            assert isinstance(outcomes[0], TransferReport), outcomes
            assert isinstance(outcomes[1], TransferReport), outcomes
            names = [name for name, _ in expected]
            assert loaded_names == [[], names[:1], names[1:]]
            with torch.no_grad():
                learner.embed.weight.add_(1.0)
                actor.embed.weight.zero_()
            theirs = copies(learner)


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_a_refused_manifest_leaves_flat_weights_unchanged(backend: WeightBackend):
    learner, actor = Tied(5), Tied(6)
    flatten_parameters(actor)
    before = copies(actor)
    calls: list[Sequence[NamedTensor]] = []
    with open_channel(TorchEndpoints(backend, BUCKET_BYTES, in_place=True)) as channel:
        outcomes = channel.transfer(
            channel.offer(1), named(learner)[1:], {1: named(actor)}, {1: calls.append}
        )
    assert isinstance(outcomes[1], WeightSyncError) and "missing: embed.weight" in str(outcomes[1])
    assert calls == []
    assert all(same_bits(tensor, before[name]) for name, tensor in named(actor))
