"""The codec: messages round-trip, and invalid bytes raise only ProtocolError."""

from dataclasses import fields, replace
from typing import get_args, get_type_hints

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speed_async.errors import ProtocolError
from speed_async.transport import messages
from speed_async.transport.codec import (
    MAGIC,
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    NUMBERS,
    Frame,
    decode,
    encode,
)
from speed_async.transport.messages import (
    PROTOCOL_VERSION,
    ActorReport,
    Counted,
    GroupFinished,
    LeaseEnded,
    Leases,
    LeaseScored,
    Message,
    OfferWeights,
    Summary,
    Trained,
)
from speed_async.transport.session import Ping
from speed_async.types import ActorCounts, Float32Array, Int32Array, WeightBackend, WeightOffer
from tests.fakes.wire_samples import as_bytes, group_message

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ABSTRACT = {Message, Counted, LeaseEnded, LeaseScored}
MESSAGE_TYPES = sorted(
    (
        value
        for value in vars(messages).values()
        if isinstance(value, type) and issubclass(value, Message) and value not in ABSTRACT
    ),
    key=lambda record: record.__name__,
)

INTS = st.integers(-(2**63), 2**63 - 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | INTS | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
VALUES = {
    int: INTS,
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=20),
    bool: st.booleans(),
    list[int]: st.lists(INTS, max_size=5),
    list[str]: st.lists(st.text(max_size=5), max_size=5),
    dict[str, float]: st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=4),
    dict[str, object]: st.dictionaries(st.text(max_size=5), PLAIN, max_size=4),
    ActorCounts: st.builds(ActorCounts, **dict.fromkeys(get_type_hints(ActorCounts), INTS)),
    WeightBackend: st.sampled_from(get_args(WeightBackend)),
    Int32Array: st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9).map(
        lambda items: np.array(items, np.int32)
    ),
    Float32Array: st.binary(max_size=36).map(
        lambda raw: np.frombuffer(raw[: len(raw) // 4 * 4], np.float32)
    ),
}
VALUES[WeightOffer] = st.builds(
    WeightOffer, **{name: VALUES[hint] for name, hint in get_type_hints(WeightOffer).items()}
)
ANY_MESSAGE = st.sampled_from(MESSAGE_TYPES).flatmap(
    lambda record: st.builds(
        record, **{name: VALUES[hint] for name, hint in get_type_hints(record).items()}
    )
)


def with_header(message: Message, change) -> list[bytes]:
    """Frames of `message` with its unpacked header modified in place by `change`."""
    header, *arrays = as_bytes(message)
    parts = msgpack.unpackb(header[NUMBERS.size :])
    change(parts)
    return [packed(parts), *arrays]


def packed(value: object) -> bytes:
    """A header with this content."""
    data = msgpack.packb(value)
    assert data is not None
    return NUMBERS.pack(1, 2) + data


def same(left: object, right: object) -> bool:
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and left.tobytes() == right.tobytes()
    return type(left) is type(right) and left == right


@settings(SLOW, max_examples=150)
@given(ANY_MESSAGE)
def test_messages_round_trip(message):
    decoded = decode(as_bytes(message))
    assert type(decoded) is type(message)
    for field in fields(message):
        assert same(getattr(message, field.name), getattr(decoded, field.name)), field.name


@settings(SLOW, max_examples=150)
@given(st.lists(st.binary(max_size=64), max_size=5))
def test_random_frames_raise_only_protocol_error(frames):
    with pytest.raises(ProtocolError):
        decode(frames)


@settings(SLOW, max_examples=150)
@given(ANY_MESSAGE, st.data())
def test_damaged_frames_raise_only_protocol_error(message, data):
    frames = as_bytes(message)
    which = data.draw(st.integers(0, len(frames) - 1))
    at = data.draw(st.integers(0, len(frames[which])))
    removed = data.draw(st.integers(0, 4))
    inserted = data.draw(st.binary(max_size=4))
    frames[which] = frames[which][:at] + inserted + frames[which][at + removed :]
    try:
        decoded = decode(frames)
    except ProtocolError:
        return
    # If the damaged message decodes, it must be fully valid, so its fields can be encoded.
    encode(replace(decoded))


@settings(SLOW, max_examples=100)
@given(
    st.sampled_from([record.__name__ for record in MESSAGE_TYPES]),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
    st.lists(st.lists(st.text() | st.integers(0, 99) | st.lists(st.integers(0, 9)))),
)
def test_arbitrary_headers_raise_only_protocol_error(name, values, specs):
    header = packed([MAGIC, PROTOCOL_VERSION, name, values, specs])
    with pytest.raises(ProtocolError):
        decode([header, b"\0\0\0\0"])


def test_decoded_arrays_are_read_only_views_of_the_frames():
    frames = as_bytes(group_message())
    message = decode(frames)
    assert isinstance(message, GroupFinished)
    assert not message.logprobs.flags.writeable
    assert np.shares_memory(message.logprobs, np.frombuffer(frames[1], np.int32))
    with pytest.raises(ValueError, match="read-only"):
        message.logprobs[0] = 0.0


def test_a_decoded_message_keeps_its_frames_and_changes_only_their_numbers():
    frames = as_bytes(group_message(number=3, received=4))
    message = decode(frames)
    assert as_bytes(message) == frames
    forwarded = message.numbered(8, 9)
    header, arrays = as_bytes(forwarded)
    assert header == NUMBERS.pack(8, 9) + frames[0][NUMBERS.size :]
    assert encode(forwarded)[1] is message.frames[1]
    again = decode([header, arrays])
    assert (again.number, again.received) == (8, 9)
    assert isinstance(again, GroupFinished)
    assert again.token_ids.tolist() == [10, 11, 12]


def test_a_changed_copy_of_a_decoded_message_has_its_own_frames():
    message = decode(as_bytes(Ping(sent=1)))
    changed = decode(as_bytes(replace(message, sent=2)))
    assert changed == Ping(sent=2)


def test_decoded_arrays_in_writable_memory_are_read_only():
    header, *arrays = as_bytes(group_message())
    message = decode([header, *(memoryview(bytearray(array)) for array in arrays)])
    assert isinstance(message, GroupFinished)
    assert not message.token_ids.flags.writeable


def test_unaligned_frames_decode_to_aligned_arrays():
    header, *arrays = as_bytes(group_message())
    shifted = [memoryview(b"x" + array)[1:] for array in arrays]
    message = decode([header, *shifted])
    assert isinstance(message, GroupFinished)
    assert message.token_ids.flags.aligned
    assert message.token_ids.tolist() == [10, 11, 12]


def test_protocol_version_mismatch_names_both_versions():
    def other_version(parts):
        parts[1] = 999
        parts[3:] = ["a layout this release cannot know"]

    with pytest.raises(ProtocolError, match=rf"int 999, this process uses {PROTOCOL_VERSION}"):
        decode(with_header(Ping(sent=1), other_version))


@pytest.mark.parametrize(
    ("message", "change", "error"),
    [
        (Ping(sent=1), lambda h: h.__setitem__(0, "other"), "begin with 'speed_async'"),
        (Ping(sent=1), lambda h: h.__setitem__(1, True), "protocol version bool True"),
        (Ping(sent=1), lambda h: h.__setitem__(2, "Nope"), "unknown message type str 'Nope'"),
        (Ping(sent=1), lambda h: h.__setitem__(2, "Message"), "unknown message type"),
        (Ping(sent=1), lambda h: h.__setitem__(2, ["Ping"]), "unknown message type list"),
        (Ping(sent=1), lambda h: h.append(0), "the header has 6 elements"),
        (Ping(sent=1), lambda h: h.__setitem__(3, [1]), "Ping must be a map"),
        (Ping(sent=1), lambda h: h[3].clear(), "Ping is missing field 'sent'"),
        (Ping(sent=1), lambda h: h[3].update(more=1), "Ping has unknown field str 'more'"),
        (Ping(sent=1), lambda h: h[3].update(sent=True), "Ping.sent must be int"),
        (Ping(sent=1), lambda h: h[3].update(sent=1.0), "Ping.sent must be int"),
        (Ping(sent=1), lambda h: h[3].update(sent=2**63), "Ping.sent must be int"),
        (Ping(sent=1), lambda h: h.__setitem__(4, [0]), "must declare the lengths of 0 arrays"),
        (
            group_message(),
            lambda h: h[3]["counts"].pop("groups_leased"),
            "GroupFinished.counts is",
        ),
        (group_message(), lambda h: h[3]["counts"].update(x=1), "counts has unknown field"),
        (group_message(), lambda h: h[3].update(counts=[1, 2]), "counts must be a map"),
        (group_message(), lambda h: h.__setitem__(4, "8"), "must declare the lengths of 8 arrays"),
        (group_message(), lambda h: h[4].pop(), "must declare the lengths of 8 arrays"),
        (
            group_message(),
            lambda h: h[4].__setitem__(0, True),
            "ids declares bool True of 20 items",
        ),
        (group_message(), lambda h: h[4].__setitem__(0, [3]), "ids declares list"),
        (group_message(), lambda h: h[4].__setitem__(1, -3), "lengths declares int -3 of 17 items"),
        (group_message(), lambda h: h[4].__setitem__(7, 4), "versions declares int 4 of 3 items"),
        (group_message(), lambda h: h[4].__setitem__(7, 2), "declares 19 items but sends 20"),
    ],
)
def test_invalid_header_error_names_the_field(message, change, error):
    with pytest.raises(ProtocolError, match=error):
        decode(with_header(message, change))


def test_missing_and_surplus_frames_are_rejected():
    frames = as_bytes(group_message())
    for wrong in (frames[:-1], [*frames, b""], [*frames, frames[1]]):
        with pytest.raises(ProtocolError, match="array frames"):
            decode(wrong)
    with pytest.raises(ProtocolError, match="an array frame of 79 bytes"):
        decode([frames[0], frames[1][:-1]])
    with pytest.raises(ProtocolError, match="has no frames"):
        decode([])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        msgpack.packb([MAGIC, PROTOCOL_VERSION, "Ping", {"sent": msgpack.ExtType(5, b"")}, []]),
        msgpack.packb([MAGIC, PROTOCOL_VERSION, "Ping", {"sent": msgpack.Timestamp(1)}, []]),
        msgpack.packb([MAGIC, PROTOCOL_VERSION, "Ping", {"sent": b"raw"}, []]),
        msgpack.packb([MAGIC, PROTOCOL_VERSION, "Ping", {1: 2}, []]),
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\x7f\xff\xff\xff",
        b"\xa5\xff\xfe\xfd\xfc\xfb",
    ],
    ids=["empty", "ext", "timestamp", "bytes", "int-key", "deep", "huge-list", "huge-map", "utf8"],
)
def test_msgpack_extensions_are_rejected(content):
    with pytest.raises(ProtocolError):
        decode([bytes(NUMBERS.size) + content])


def test_size_limits_are_enforced_on_both_ends():
    long = Trained(
        policy_version=1,
        lease_ids=[2**62] * (MAX_HEADER_BYTES // 9 + 1),
        skipped=False,
        groups_trained=1,
        completions_trained=1,
        tokens_trained=1,
        metrics={},
    )
    with pytest.raises(ProtocolError, match="the header has"):
        encode(long)
    with pytest.raises(ProtocolError, match="the header has"):
        decode([bytes(NUMBERS.size + MAX_HEADER_BYTES + 1)])
    with pytest.raises(ProtocolError, match="begins with 16 bytes of numbers"):
        decode([bytes(NUMBERS.size - 1)])
    tokens = np.zeros(MAX_MESSAGE_BYTES // 4, np.int32)
    with pytest.raises(ProtocolError, match="GroupFinished has"):
        encode(group_message(token_ids=tokens))
    frames: list[Frame] = [*as_bytes(group_message())]
    frames[1] = tokens.view(np.uint8).data  # untouched zero pages use no memory
    with pytest.raises(ProtocolError, match="GroupFinished has"):
        decode(frames)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (Ping(sent=np.int64(3)), "Ping.sent must be int, not int64"),  # type: ignore
        (Ping(sent=True), "Ping.sent must be int, not bool"),
        (Ping(sent=2**63), "Ping.sent must be int"),
        (Ping(sent=1, number=2**63), "Ping.number must be int"),
        (Ping(sent=1, received=1.0), "Ping.received must be int, not float"),  # type: ignore
        (group_message(lengths=np.array([2, 1])), "lengths must be one-dimensional <i4 array"),
        (group_message(lengths=[2, 1]), "lengths must be one-dimensional <i4 array, not list"),
        (group_message(token_ids=np.zeros((3, 1), np.int32)), "token_ids must be one-dim"),
        (group_message(counts=None), "counts must be ActorCounts, not NoneType"),
        (ActorReport(counts=ActorCounts(), gauges={"a": "b"}), "gauges must be"),  # type: ignore
        (Summary(fields={"a": (1, 2)}), "fields must be"),
        (Summary(fields={"a": {1: 2}}), "fields must be"),
        (Leases(lease_ids=[1], prompt_ids=[1.0], kind="", num_samples=0), "prompt_ids"),  # type: ignore
        (Message(), "Message is not a message type"),
        (Counted(counts=ActorCounts()), "Counted is not a message type"),
    ],
)
def test_invalid_messages_are_rejected_by_encode(message, error):
    with pytest.raises(ProtocolError, match=error):
        encode(message)


def offer(deadline_s: float, backend: str = "gloo") -> OfferWeights:
    return OfferWeights(
        offer=WeightOffer(
            policy_version=1,
            epoch=1,
            rank=1,
            world_size=2,
            store_host="h",
            store_port=1,
            backend=backend,  # type: ignore[arg-type]
            deadline_s=deadline_s,
        )
    )


def test_an_unknown_weight_backend_is_rejected():
    for backend in ("gloo", "nccl", "ipc"):
        assert decode(as_bytes(offer(5.0, backend))) == offer(5.0, backend)
    with pytest.raises(ProtocolError, match=r"backend must be .* not str 'mpi'"):
        encode(offer(5.0, "mpi"))


def test_float_fields_accept_int_and_reject_non_finite():
    assert decode(as_bytes(offer(5))) == offer(5)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ProtocolError, match="deadline_s must be float"):
            encode(offer(value))


def test_metrics_may_report_nan():
    decoded = decode(as_bytes(ActorReport(counts=ActorCounts(), gauges={"loss": float("nan")})))
    assert isinstance(decoded, ActorReport)
    assert np.isnan(decoded.gauges["loss"])


def test_strided_arrays_are_sent_by_value():
    message = decode(as_bytes(group_message(token_ids=np.arange(6, dtype=np.int32)[::2])))
    assert isinstance(message, GroupFinished)
    assert message.token_ids.tolist() == [0, 2, 4]
