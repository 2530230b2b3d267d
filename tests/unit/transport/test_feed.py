"""The metrics feed: events reach subscribers, and no subscriber can disturb the publisher."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import msgpack
import pytest
import uvloop
import zmq
import zmq.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speed_async.errors import ConfigError, DeadlineExceeded, ProtocolError, TransportClosed
from speed_async.observability.metrics import Event
from speed_async.transport.codec import MAGIC
from speed_async.transport.feed import (
    QUEUED_EVENTS,
    FeedPublisher,
    FeedSubscriber,
    decode_event,
    encode_event,
)
from speed_async.transport.messages import PROTOCOL_VERSION

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
HOST = "127.0.0.1"
SOON_S = 10.0

STATUS = Event(
    kind="status",
    values={"wall_s": 1.5, "updates_total": 3, "phase": "training", "ok": True, "accuracy": None},
)


def run_test(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(3 * SOON_S):
            await test()

    uvloop.run(bounded())


async def connected_subscriber(publisher: FeedPublisher) -> FeedSubscriber:
    """A subscriber that has received its first event (subscribing takes time)."""
    subscriber = FeedSubscriber(HOST, publisher.port)
    async with asyncio.timeout(SOON_S):
        while True:
            await publisher.publish(Event(kind="status", values={"joining": True}))
            try:
                await subscriber.receive(0.02)
                break
            except DeadlineExceeded:
                continue
    return subscriber


async def next_step(subscriber: FeedSubscriber) -> Event:
    """Skip events that were published while the subscriber connected."""
    while True:
        event = await subscriber.receive(SOON_S)
        if "joining" not in event.values:
            return event


@settings(SLOW, max_examples=100)
@given(
    st.sampled_from(["status", "step", "evaluation", "end"]),
    st.dictionaries(
        st.text(max_size=8),
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False)
        | st.text(max_size=8),
    ),
)
def test_events_round_trip(kind, values):
    event = Event(kind=kind, values=values)
    decoded = decode_event(encode_event(event))
    assert decoded == event
    assert {key: type(value) for key, value in decoded.values.items()} == {
        key: type(value) for key, value in values.items()
    }


@settings(SLOW, max_examples=150)
@given(st.binary(max_size=64), st.data())
def test_damaged_events_raise_only_protocol_error(noise, data):
    frame = encode_event(STATUS)
    at = data.draw(st.integers(0, len(frame)))
    for damaged in (noise, frame[:at] + noise + frame[at:], frame[:at] + noise):
        try:
            encode_event(decode_event(damaged))
        except ProtocolError:
            continue


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (
            [MAGIC, 99, "status", {}],
            f"version int 99, this process uses {PROTOCOL_VERSION}",
        ),
        ([MAGIC, PROTOCOL_VERSION, "news", {}], "unknown event kind 'news'"),
        ([MAGIC, PROTOCOL_VERSION, ["status"], {}], "unknown event kind"),
        ([MAGIC, PROTOCOL_VERSION, "status"], "the event has 3 elements"),
        ([MAGIC, PROTOCOL_VERSION, "status", {"a": [1]}], "must be a map of plain scalars"),
        ([MAGIC, PROTOCOL_VERSION, "status", [1]], "must be a map of plain scalars"),
    ],
)
def test_invalid_events_are_rejected(header, error):
    with pytest.raises(ProtocolError, match=error):
        decode_event(msgpack.packb(header))  # type: ignore


def test_events_reach_every_subscriber_in_order():
    async def test() -> None:
        publisher = FeedPublisher(HOST, 0)
        subscribers = [await connected_subscriber(publisher) for _ in range(3)]
        events = [Event(kind="step", values={"updates_total": number}) for number in range(50)]
        for event in events:
            await publisher.publish(event)
        for subscriber in subscribers:
            received = [await next_step(subscriber)]
            received += [await subscriber.receive(SOON_S) for _ in events[1:]]
            assert received == events
            await subscriber.close()
        await publisher.close()

    run_test(test)


def test_late_subscriber_receives_the_next_event():
    async def test() -> None:
        publisher = FeedPublisher(HOST, 0)
        for number in range(1000):
            await publisher.publish(Event(kind="step", values={"updates_total": number}))
        subscriber = await connected_subscriber(publisher)
        await publisher.publish(STATUS)
        assert await next_step(subscriber) == STATUS
        await subscriber.close()
        await publisher.close()

    run_test(test)


def test_subscriber_can_start_before_the_publisher():
    async def test() -> None:
        first = FeedPublisher(HOST, 0)
        await first.close()
        subscriber = FeedSubscriber(HOST, first.port)
        with pytest.raises(DeadlineExceeded, match=r"metrics feed at .*: an event"):
            await subscriber.receive(0.02)
        publisher = FeedPublisher(HOST, first.port)
        async with asyncio.timeout(SOON_S):
            received = None
            while received is None:
                await publisher.publish(STATUS)
                try:
                    received = await subscriber.receive(0.02)
                except DeadlineExceeded:
                    continue
        assert received == STATUS
        await subscriber.close()
        await publisher.close()

    run_test(test)


def test_stalled_subscriber_uses_bounded_memory_and_delays_no_other():
    async def test() -> None:
        publisher = FeedPublisher(HOST, 0)
        stalled = await connected_subscriber(publisher)
        reader = await connected_subscriber(publisher)
        text = "x" * 100_000
        num_published = 2000  # 200 MB: more than queues and socket buffers hold

        async def publish() -> None:
            for number in range(num_published):
                await publisher.publish(
                    Event(kind="status", values={"number": number, "text": text})
                )
                await asyncio.sleep(0)
            await publisher.publish(Event(kind="end", values={"ok": True}))

        async def read_to_end() -> None:
            while (await reader.receive(SOON_S)).kind != "end":
                await publisher.publish(Event(kind="end", values={"ok": True}))

        await publish()
        await read_to_end()
        received = []
        with pytest.raises(DeadlineExceeded):
            while True:
                received.append(await stalled.receive(0.2))
        assert QUEUED_EVENTS <= len(received) < num_published
        for used in (stalled, reader, publisher):
            await used.close()

    run_test(test)


def test_data_from_subscribers_is_ignored():
    async def test() -> None:
        publisher = FeedPublisher(HOST, 0)
        subscriber = await connected_subscriber(publisher)
        context = zmq.asyncio.Context()
        misbehaving = context.socket(zmq.XSUB)
        misbehaving.connect(f"tcp://{HOST}:{publisher.port}")
        await misbehaving.send(b"\x01")
        await misbehaving.send(b"stop the run")
        await misbehaving.send(b"\x01" + b"x" * 10_000)
        with socket.create_connection((HOST, publisher.port)) as other:
            other.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
            for number in range(20):
                await publisher.publish(Event(kind="step", values={"updates_total": number}))
        assert (await next_step(subscriber)).values == {"updates_total": 0}
        context.destroy(linger=0)
        await subscriber.close()
        await publisher.close()

    run_test(test)


def test_protocol_version_mismatch_on_the_feed_is_reported():
    async def test() -> None:
        context = zmq.asyncio.Context()
        other = context.socket(zmq.PUB)
        port = other.bind_to_random_port(f"tcp://{HOST}")
        subscriber = FeedSubscriber(HOST, port)
        with pytest.raises(ProtocolError, match=f"int 99, this process uses {PROTOCOL_VERSION}"):
            async with asyncio.timeout(SOON_S):
                while True:
                    await other.send(msgpack.packb([MAGIC, 99, "status", {}]))
                    try:
                        await subscriber.receive(0.02)
                    except DeadlineExceeded:
                        continue
        await subscriber.close()
        context.destroy(linger=0)

    run_test(test)


def test_close_is_idempotent_and_ends_waits():
    async def test() -> None:
        publisher = FeedPublisher(HOST, 0)
        subscriber = FeedSubscriber(HOST, publisher.port)
        waiting = asyncio.ensure_future(subscriber.receive(SOON_S))
        await asyncio.sleep(0)
        for _ in range(2):
            await subscriber.close()
            await publisher.close()
        with pytest.raises(TransportClosed):
            await waiting
        with pytest.raises(TransportClosed):
            await publisher.publish(STATUS)

    run_test(test)


def test_a_feed_port_in_use_is_a_config_error():
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="choose another port") as refused:
            FeedPublisher(HOST, port)
    assert refused.value.field == "cluster.feed_port"


def test_invalid_events_are_rejected_by_encode():
    with pytest.raises(ProtocolError, match="must be a map of plain scalars"):
        encode_event(Event(kind="status", values={"a": [1]}))  # type: ignore
    with pytest.raises(ProtocolError, match="unknown event kind"):
        encode_event(Event(kind="news", values={}))  # type: ignore
