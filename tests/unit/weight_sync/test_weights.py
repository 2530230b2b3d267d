"""Weight transfers: bitwise correctness, refusals and deadlines."""

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from speed_async.errors import ConfigError, WeightSyncError
from speed_async.testing.memory_channel import MemoryReceiver, MemorySender, MemoryStore
from speed_async.types import WeightOffer
from speed_async.weight_sync.broadcast import TorchSender
from speed_async.weight_sync.buckets import pack, plan_buckets, unpack
from speed_async.weight_sync.canary_check import Canary
from speed_async.weight_sync.channel import NamedTensor, TransferReport
from speed_async.weight_sync.digests import tensor_digests
from speed_async.weight_sync.float_dtypes import decode_dtypes
from speed_async.weight_sync.manifest import (
    KnownTensors,
    Manifest,
    TensorSpec,
    decode_manifest,
    describe,
    encode_manifest,
)
from speed_async.weight_sync.process_group import choose_backend, host_store
from tests.fakes.weights_contract import (
    Channel,
    Loaded,
    assert_arrived,
    channel,
    mixed_tensors,
    on_every_channel,
    same_bits,
    send_to,
)

__all__ = ["channel"]

CHILD_STARTS_S = 60.0
CPU = torch.device("cpu")


@on_every_channel()
def test_mixed_tensors_are_received_bitwise_by_two_receivers(channel: Channel):
    loaded = send_to(channel, channel.offer(1, world_size=3), mixed_tensors())
    for rank in (1, 2):
        assert_arrived(loaded[rank], mixed_tensors())
    # embed: 1,600 bytes, alone. Then norm ends at 8, steps 16..24, transposed 32..224, flags
    # 224..227, ids 240..744; head would take 752..1,040.
    assert loaded[1].buckets == [
        ["embed"],
        ["norm", "steps", "empty", "transposed", "flags", "ids"],
        ["head"],
    ]


@on_every_channel()
def test_consecutive_versions_reuse_an_epoch_and_report_their_size(channel: Channel):
    for policy_version in (1, 2, 3):
        tensors = [("w", torch.full((512,), float(policy_version))), ("b", torch.ones(3))]
        offer = channel.offer(policy_version)
        loaded = Loaded()
        outcomes = channel.transfer(offer, tensors, {1: tensors}, {1: loaded.load})
        assert_arrived(loaded, tensors)
        for rank in (0, 1):
            report = outcomes[rank]
            assert isinstance(report, TransferReport)
            assert (report.num_bytes, report.num_buckets) == (2048 + 12, 2)


@on_every_channel()
def test_a_new_epoch_may_have_more_or_fewer_members(channel: Channel):
    for epoch, world_size in enumerate((2, 4, 3), start=1):
        tensors = [("w", torch.full((300,), float(epoch)))]
        offer = channel.offer(epoch, epoch=epoch, world_size=world_size)
        for loaded in send_to(channel, offer, tensors).values():
            assert_arrived(loaded, tensors)


@on_every_channel(bucket_bytes=64 * 1024)
def test_a_manifest_of_many_tensors_is_received(channel: Channel):
    tensors = [(f"model.layers.{index}.weight", torch.full((3,), index)) for index in range(2000)]
    size = len(
        encode_manifest(Manifest(policy_version=1, bucket_bytes=1, tensors=describe(tensors)))
    )
    assert size > 64 * 1024
    assert_arrived(send_to(channel, channel.offer(1), tensors)[1], tensors)


@on_every_channel()
def test_a_tied_tensor_is_sent_once_and_updates_both_names(channel: Channel):
    class Tied(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.embed.weight = self.head.weight = nn.Parameter(torch.full((5, 3), value))

    def weights(model: nn.Module) -> list[NamedTensor]:
        return [(name, each.detach()) for name, each in model.named_parameters()]

    learner, actor = Tied(2.0), Tied(1.0)

    def load(tensors: Sequence[NamedTensor]) -> None:
        for name, tensor in tensors:
            dict(weights(actor))[name].copy_(tensor)

    outcomes = channel.transfer(channel.offer(1), weights(learner), {1: weights(actor)}, {1: load})
    for outcome in outcomes.values():
        assert isinstance(outcome, TransferReport) and outcome.num_bytes == 5 * 3 * 4
    assert actor.head.weight is actor.embed.weight
    assert actor.head.weight.eq(2.0).all()


@on_every_channel()
def test_nothing_is_sent_without_receivers(channel: Channel):
    report = channel.sender.send(channel.offer(1, world_size=1), mixed_tensors())
    assert (report.num_bytes, report.num_buckets) == (0, 0)


@on_every_channel()
def test_the_sender_converts_floating_point_tensors_to_the_stated_dtypes(channel: Channel):
    tensors = [
        ("w", torch.tensor([1.0, 1.00390625])),
        ("v", torch.ones(2)),
        ("router", torch.tensor([1.00390625])),
        ("n", torch.tensor([2**40 + 1])),
    ]
    half = torch.bfloat16
    in_half = torch.empty(2, dtype=half)
    shapes = [in_half, in_half.clone(), torch.empty(1), tensors[3][1]]
    expected = [(name, each) for (name, _), each in zip(tensors, shapes, strict=True)]
    loaded = Loaded()
    outcomes = channel.transfer(channel.offer(1), tensors, {1: expected}, {1: loaded.load})
    assert isinstance(outcomes[0], TransferReport), outcomes
    # bfloat16 has 8 significant bits: 1 + 2**-8 is a tie and rounds to even, 1.0.
    assert same_bits(loaded.tensors["w"], torch.tensor([1.0, 1.0], dtype=half))
    assert same_bits(loaded.tensors["router"], torch.tensor([1.00390625]))
    assert loaded.tensors["n"].tolist() == [2**40 + 1]


@on_every_channel()
def test_receivers_with_different_dtypes_are_refused_by_name(channel: Channel):
    tensors = [("w", torch.ones(2))]
    expected: dict[int, Sequence[NamedTensor]] = {
        1: tensors,
        2: [("w", torch.ones(2, dtype=torch.float16))],
    }
    loaded = {rank: Loaded() for rank in expected}
    outcomes = channel.transfer(
        channel.offer(1, world_size=3),
        tensors,
        expected,
        {rank: each.load for rank, each in loaded.items()},
    )
    for outcome in outcomes.values():
        assert isinstance(outcome, WeightSyncError)
        assert "rank 1 loads float32 and rank 2 float16: all actors must load one" in str(outcome)
    assert isinstance(outcomes[0], WeightSyncError) and outcomes[0].missing_ranks == (2,)
    assert not loaded[1].tensors


def test_malformed_dtypes_are_refused():
    for text in ("", "[]", '{"common": "int64", "others": {}}', '{"common": 1, "others": {}}'):
        with pytest.raises(WeightSyncError, match="malformed dtypes"):
            decode_dtypes(text)


@on_every_channel()
def test_the_canary_is_received_bitwise_and_is_optional(channel: Channel):
    tensors = [("w", torch.ones(3))]
    # 1/3 needs all digits of a double; the others are the smallest double and a float32 value.
    canary = Canary(token_ids=(0, 151_935, 7, 7), logprobs=(-1 / 3, -5e-324, -0.1 - 1.5e-9))
    for policy_version, sent in ((1, canary), (2, None)):
        offer = channel.offer(policy_version, world_size=3)
        loads = {rank: Loaded().load for rank in (1, 2)}
        outcomes = channel.transfer(offer, tensors, dict.fromkeys(loads, tensors), loads, sent)
        for rank in loads:
            report = outcomes[rank]
            assert isinstance(report, TransferReport), report
            assert report.canary == sent


@on_every_channel()
def test_receivers_get_the_digests_of_the_tensors_as_sent(channel: Channel):
    half = torch.tensor([1.0, 1.00390625]), torch.empty(2, dtype=torch.bfloat16)
    tensors, expected = [("v", half[0]), *mixed_tensors()], [("v", half[1]), *mixed_tensors()]
    loaded = Loaded()
    outcomes = channel.transfer(channel.offer(1), tensors, {1: expected}, {1: loaded.load})
    report = outcomes[1]
    assert isinstance(report, TransferReport), report
    assert report.digests == tensor_digests(loaded.tensors.items())
    assert set(report.digests) == {name for name, _ in tensors}


@on_every_channel()
def test_a_refused_manifest_is_reported_by_both_sides_and_loads_nothing(channel: Channel):
    sent = [("a", torch.ones(2)), ("b", torch.ones(2, 3)), ("c", torch.ones(1))]
    wanted = [
        ("a", torch.ones(2, dtype=torch.int32)),
        ("b", torch.ones(3, 2)),
        ("d", torch.ones(1)),
    ]
    loaded = {1: Loaded(), 2: Loaded()}
    outcomes = channel.transfer(
        channel.offer(1, world_size=3),
        sent,
        {1: sent, 2: wanted},
        {rank: each.load for rank, each in loaded.items()},
    )
    difference = (
        "missing: d; not expected: c; different: a is float32[2], expected int32[2],"
        " b is float32[2, 3], expected float32[3, 2]"
    )
    assert isinstance(outcomes[2], WeightSyncError) and difference in str(outcomes[2])
    assert isinstance(outcomes[0], WeightSyncError)
    assert f"rank 2 refused: {difference}" in str(outcomes[0])
    assert loaded[2].tensors == {}
    with pytest.raises(WeightSyncError, match="epoch 1 is unusable"):
        channel.sender.send(channel.offer(2, world_size=3), sent)
    send_to(channel, channel.offer(2, epoch=2, world_size=3), sent)


def assert_other_version_refused(channel: Channel, *, sent: int, offered: int) -> None:
    """Rank 1 is offered one version and sent another one, loads nothing, and both sides report
    it."""
    tensors = [("w", torch.ones(4))]
    loaded, errors = Loaded(), []

    def receive() -> None:
        with pytest.raises(WeightSyncError) as caught:
            channel.receiver(1).receive(channel.offer(offered, 1), tensors, loaded.load)
        errors.append(str(caught.value))

    thread = threading.Thread(target=receive)
    thread.start()
    difference = f"policy version {sent} was received, {offered}"
    with pytest.raises(WeightSyncError, match=f"rank 1 refused: {difference}"):
        channel.sender.send(channel.offer(sent), tensors)
    thread.join(CHILD_STARTS_S)
    assert f"{difference} was offered" in errors[0]
    assert loaded.tensors == {}


@on_every_channel()
def test_a_receiver_refuses_a_version_that_was_not_offered(channel: Channel):
    assert_other_version_refused(channel, sent=6, offered=5)


@on_every_channel()
def test_a_later_transfer_also_refuses_a_wrong_version(channel: Channel):
    send_to(channel, channel.offer(1), [("w", torch.ones(4))])
    assert_other_version_refused(channel, sent=2, offered=5)


@on_every_channel()
def test_tensors_may_change_within_an_epoch(channel: Channel):
    few = [("w", torch.full((300,), 1.0))]
    many = [("w", torch.full((7, 9), 2.0)), ("v", torch.full((500,), 3.0))]
    for policy_version, tensors in enumerate((few, many, many, few), start=1):
        assert_arrived(send_to(channel, channel.offer(policy_version), tensors)[1], tensors)


@on_every_channel()
def test_a_receiver_that_never_joins_is_named(channel: Channel):
    tensors = [("w", torch.ones(4))]
    loaded = Loaded()
    started_s = time.monotonic()
    outcomes = channel.transfer(
        channel.offer(1, world_size=3, deadline_s=1.0), tensors, {1: tensors}, {1: loaded.load}
    )
    assert time.monotonic() - started_s < 5.0
    error = outcomes[0]
    assert isinstance(error, WeightSyncError)
    assert "rendezvous failed after 1." in str(error) and "rank 2 never joined" in str(error)
    assert isinstance(outcomes[1], WeightSyncError) and "rendezvous" in str(outcomes[1])
    assert loaded.tensors == {}
    send_to(channel, channel.offer(1, epoch=2), tensors)


def test_a_lost_receiver_ends_the_wait_of_the_sender_and_is_named():
    sender = TorchSender(host="127.0.0.1", bucket_bytes=1024, device=CPU)
    offer = WeightOffer(
        policy_version=1,
        epoch=1,
        rank=0,
        world_size=3,
        store_host=sender.store_address[0],
        store_port=sender.store_address[1],
        backend="gloo",
        deadline_s=600.0,
    )
    lost: set[int] = set()
    threading.Timer(0.05, lost.add, [2]).start()
    with pytest.raises(WeightSyncError, match="rank 2 never joined") as raised:
        sender.send(offer, [("w", torch.ones(4))], lost=lost)
    assert raised.value.missing_ranks == (2,)  # rank 1 may still come
    sender.close()


@on_every_channel()
def test_a_receiver_without_a_sender_stops_at_the_deadline(channel: Channel):
    offer = channel.offer(1, 1, deadline_s=1.0)
    started_s = time.monotonic()
    with pytest.raises(WeightSyncError, match="rendezvous failed after 1"):
        channel.receiver(1).receive(offer, [("w", torch.ones(4))], Loaded().load)
    assert 1.0 <= time.monotonic() - started_s < 4.0


@on_every_channel()
def test_an_error_in_load_propagates_and_ends_the_epoch(channel: Channel):
    tensors = [(f"w{index}", torch.ones(256)) for index in range(6)]  # one bucket each

    def fail(_: Sequence[NamedTensor]) -> None:
        raise LookupError("no such parameter")

    outcomes = channel.transfer(channel.offer(1), tensors, {1: tensors}, {1: fail})
    assert isinstance(outcomes[1], LookupError)
    with pytest.raises(WeightSyncError, match="epoch 1"):
        channel.sender.send(channel.offer(2, deadline_s=1.0), tensors)
    send_to(channel, channel.offer(2, epoch=2), tensors)


@on_every_channel()
def test_a_duplicate_name_is_rejected(channel: Channel):
    with pytest.raises(WeightSyncError, match="'w' is announced twice"):
        channel.sender.send(channel.offer(1), [("w", torch.ones(1)), ("w", torch.ones(1))])


def test_the_memory_channel_records_calls_and_invalidates_tensors():
    store = MemoryStore()
    sender, receiver = MemorySender(store, bucket_bytes=64), MemoryReceiver(store)
    host, port = sender.store_address
    offer = WeightOffer(
        policy_version=1,
        epoch=1,
        rank=0,
        world_size=2,
        store_host=host,
        store_port=port,
        backend="gloo",
        deadline_s=5.0,
    )
    tensors = [("w", torch.ones(3))]
    kept: list[Tensor] = []
    theirs = replace(offer, rank=1)
    thread = threading.Thread(
        target=lambda: receiver.receive(theirs, tensors, lambda ts: kept.append(ts[0][1]))
    )
    thread.start()
    sender.send(offer, tensors)
    thread.join(CHILD_STARTS_S)
    assert [(call.offer, call.names) for call in sender.calls] == [(offer, ("w",))]
    assert [(call.offer, call.expected_names) for call in receiver.calls] == [(theirs, ("w",))]
    assert kept[0].tolist() == [0.0, 0.0, 0.0]


# --- components ---------------------------------------------------------------------------------


def test_buckets_are_filled_in_order_and_aligned():
    specs = describe(
        [("a", torch.ones(5)), ("b", torch.ones(4)), ("c", torch.ones(100)), ("d", torch.ones(1))]
    )
    plan = plan_buckets(specs, 64)
    starts = [[(each.spec.name, each.start) for each in bucket.tensors] for bucket in plan]
    # a: 0..20, b: 32..48; c has 400 bytes and its own bucket; d starts the next bucket.
    assert starts == [[("a", 0), ("b", 32)], [("c", 0)], [("d", 0)]]
    assert [bucket.num_bytes for bucket in plan] == [48, 400, 4]


def test_packing_and_unpacking_a_bucket_are_inverse():
    tensors = dict(mixed_tensors())
    plan = plan_buckets(describe(list(tensors.items())), 1024)
    for bucket in plan:
        views = unpack(bucket, torch.empty(bucket.num_bytes, dtype=torch.uint8))
        pack(tensors, views)
        for name, tensor in views:
            assert same_bits(tensor, tensors[name])


def test_encoding_and_decoding_a_manifest_are_inverse():
    tensors = mixed_tensors()
    manifest = Manifest(
        policy_version=9,
        bucket_bytes=64,
        tensors=describe(tensors),
        digests=tensor_digests(tensors),
    )
    assert decode_manifest(encode_manifest(manifest)) == manifest


def test_a_known_list_of_tensors_is_sent_as_a_digest():
    specs = describe([(f"w{index}", torch.ones(index)) for index in range(1000)])
    manifest = Manifest(policy_version=9, bucket_bytes=64, tensors=specs)
    known = KnownTensors(specs)
    payload = encode_manifest(manifest, known)
    assert len(payload) < 200
    assert decode_manifest(payload, known) == manifest
    other = KnownTensors(specs[:-1])
    for unknown in (other, None):
        with pytest.raises(WeightSyncError, match="refers to unknown tensors"):
            decode_manifest(payload, unknown)
    assert decode_manifest(encode_manifest(manifest, other)) == manifest


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"\x80\x04N.", "not JSON"),
        (b"[]", "not of format 4"),
        (
            b'{"format": 1, "policy_version": 1, "bucket_bytes": 1, "canary": null,'
            b' "memory": null, "tensors": []}',
            "format 4",
        ),
        (b'{"format": 4, "policy_version": 1, "bucket_bytes": 1, "tensors": []}', "format 4"),
        (
            b'{"format": 4, "policy_version": 1, "bucket_bytes": 0, "canary": null,'
            b' "memory": null, "tensors": []}',
            "format 4",
        ),
        (
            b'{"format": 4, "policy_version": 1, "bucket_bytes": 1, "canary": null,'
            b' "memory": null, "digests": [], "tensors": [["w", "object", [1]]]}',
            r"malformed entry: \['w', 'object'",
        ),
        (
            b'{"format": 4, "policy_version": 1, "bucket_bytes": 1, "canary": null,'
            b' "memory": null, "digests": [], "tensors": [["w", "float32", [-1]]]}',
            "malformed entry",
        ),
        (
            b'{"format": 4, "policy_version": 1, "bucket_bytes": 1, "canary": null,'
            b' "memory": null, "digests": [], "tensors":'
            b' [["w", "float32", [1]], ["w", "float32", [1]]]}',
            "'w' is announced twice",
        ),
        *(
            (
                b'{"format": 4, "policy_version": 1, "bucket_bytes": 1, "canary": null,'
                b' "memory": null, "digests": ' + digests + b', "tensors":'
                b' [["v", "float32", [1]], ["w", "float32", [1]]]}',
                "manifest of 2 tensors has malformed digests",
            )
            for digests in (b"[1]", b"[1, 2, 3]", b"[1, true]", b"[1, 9223372036854775808]")
        ),
    ],
)
def test_a_malformed_manifest_is_rejected(payload: bytes, message: str):
    with pytest.raises(WeightSyncError, match=message):
        decode_manifest(payload)


def test_an_oversized_manifest_is_rejected():
    spec = TensorSpec(name="w" * (17 * 1024 * 1024), dtype=torch.float32, shape=(1,))
    manifest = Manifest(policy_version=1, bucket_bytes=64, tensors=(spec,))
    with pytest.raises(WeightSyncError, match="more than 8388608"):
        encode_manifest(manifest)


def test_the_store_is_served_on_one_interface_until_close():
    sender = TorchSender(host="127.0.0.1", bucket_bytes=64, device=CPU)
    _, port = sender.store_address
    connected = subprocess.run(
        [sys.executable, "-c", CONNECT, str(port)], capture_output=True, text=True, timeout=240
    )
    assert connected.stdout.split() == ["127.0.0.1", "open", "127.0.0.2", "refused"]
    sender.close()
    with pytest.raises(WeightSyncError, match="closed"):
        sender.send(offer_of(sender), [("w", torch.ones(1))])


CONNECT = """
import socket, sys
for host in ("127.0.0.1", "127.0.0.2"):
    try:
        socket.create_connection((host, int(sys.argv[1])), 5).close()
        print(host, "open")
    except ConnectionRefusedError:
        print(host, "refused")
"""


def offer_of(sender: TorchSender) -> WeightOffer:
    host, port = sender.store_address
    return WeightOffer(
        policy_version=1,
        epoch=1,
        rank=0,
        world_size=2,
        store_host=host,
        store_port=port,
        backend="gloo",
        deadline_s=1.0,
    )


def test_a_store_host_of_another_machine_is_a_configuration_error():
    with pytest.raises(WeightSyncError, match=r"'192\.0\.2\.1'.*cluster\.host"):
        host_store("192.0.2.1", 1.0)


# --- the choice of the backend ------------------------------------------------------------------

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("configured", "device", "actor_gpus", "one_machine", "chosen"),
    [
        ("auto", CPU, [()], True, "gloo"),
        ("auto", CPU, [(1,)], True, "gloo"),
        ("auto", GPU, [(0,)], True, "ipc"),
        ("auto", GPU, [(0,), (0,)], True, "ipc"),
        ("auto", GPU, [(0,)], False, "gloo"),
        ("auto", GPU, [(1,)], False, "nccl"),
        ("auto", GPU, [], False, "nccl"),
        # Two GPUs and two actors: the first actor cannot open memory of GPU 0.
        ("auto", GPU, [(1,), (0,)], True, "gloo"),
        ("auto", GPU, [(1, 2), (3, 4)], True, "nccl"),
        ("gloo", GPU, [(1,)], True, "gloo"),
        ("nccl", GPU, [(1,), (2,)], True, "nccl"),
        ("ipc", GPU, [(0,), (0,)], True, "ipc"),
        ("ipc", CPU, [(), ()], True, "ipc"),
    ],
)
def test_choose_backend(
    configured: str,
    device: torch.device,
    actor_gpus: Sequence[Sequence[int]],
    one_machine: bool,
    chosen: str,
):
    backend = choose_backend(configured, device, actor_gpus=actor_gpus, one_machine=one_machine)
    assert backend == chosen


def test_actors_on_the_cpu_use_neither_the_learners_gpu_nor_nccl():
    def choose(configured: str, *, gpu: int) -> str:
        return choose_backend(configured, GPU, actor_gpus=[(gpu,)], actors_device="cpu")

    assert choose("auto", gpu=0) == choose("auto", gpu=1) == "gloo"
    with pytest.raises(ConfigError, match=r"weights\.backend.*actors\.device = 'cpu'"):
        choose("ipc", gpu=0)
    with pytest.raises(ConfigError, match=r"weights\.backend.*actors\.device = 'cpu'"):
        choose("nccl", gpu=1)


def test_nccl_on_one_gpu_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"weights\.backend.*'auto'"):
        choose_backend("nccl", GPU, actor_gpus=[(0,)])


def test_ipc_with_actors_that_do_not_see_the_learners_gpu_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"weights\.backend.*'cuda:0'.*use 'auto'"):
        choose_backend("ipc", GPU, actor_gpus=[(1,), (0,)])


def test_ipc_over_several_nodes_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"weights\.backend.*several nodes; use 'auto'"):
        choose_backend("ipc", CPU, actor_gpus=[()], one_machine=False)
