"""The contract of every transport."""

import asyncio
import functools

import numpy as np
import pytest

from speed_async.errors import DeadlineExceeded, ProtocolError, TransportClosed
from speed_async.transport.codec import encode
from speed_async.transport.messages import (
    PROTOCOL_VERSION,
    GroupFinished,
    Rejected,
    WantWork,
    Welcome,
)
from speed_async.transport.session import Ping
from speed_async.transport.transport import Delivery
from speed_async.types import ActorCounts
from tests.fakes.transport_contract import (
    SOON_S,
    TransportSetup,
    offer_until_queued,
    on_every_transport,
)
from tests.fakes.wire_samples import as_bytes, group_message


def want_work(num_prompts: int) -> WantWork:
    return WantWork(counts=ActorCounts(), num_prompts=num_prompts)


async def connected_link(setup: TransportSetup, name: str):
    """A link that is registered at the hub."""
    link = await setup.link(name)
    await link.send(want_work(0))
    assert await setup.hub.receive(SOON_S) == (name, want_work(0))
    return link


@on_every_transport(queued_messages=8)
async def test_messages_arrive_complete_and_in_order_in_both_directions(setup: TransportSetup):
    link = await connected_link(setup, "actor-1.0")
    total = 500

    async def send_all() -> None:
        for number in range(total):
            await link.send(want_work(number))

    async def reply_all() -> list[int]:
        numbers = []
        for _ in range(total):
            peer, message = await setup.hub.receive(SOON_S)
            assert isinstance(message, WantWork)
            numbers.append(message.num_prompts)
            await offer_until_queued(setup.hub, peer, Ping(sent=message.num_prompts))
        return numbers

    async def receive_all() -> list[int]:
        answers = [await link.receive(SOON_S) for _ in range(total)]
        return [message.sent for message in answers if isinstance(message, Ping)]

    _, received, answered = await asyncio.gather(send_all(), reply_all(), receive_all())
    assert received == list(range(total))
    assert answered == list(range(total))


@on_every_transport(queued_messages=2)
async def test_concurrent_sender_and_receiver_never_miss_a_wakeup(
    setup: TransportSetup,
):
    # With full queues in both directions one waiter can consume the wake-up of the other.
    link = await connected_link(setup, "actor-1.0")
    total = 1000

    async def send_all(send) -> None:
        for number in range(total):
            await send(Ping(sent=number))

    async def receive_all(receive) -> None:
        for _ in range(total):
            await receive(SOON_S)

    await asyncio.gather(
        send_all(link.send),
        receive_all(link.receive),
        send_all(functools.partial(offer_until_queued, setup.hub, "actor-1.0")),
        receive_all(setup.hub.receive),
    )


@on_every_transport()
async def test_arrays_arrive_bitwise_identical(setup: TransportSetup):
    link = await connected_link(setup, "actor-1.0")
    patterns = np.array([0, 1 << 31, 1, 0x7F800000, 0x7FC00001, 0xFFFFFFFF], np.uint32)
    message = group_message(
        logprobs=patterns.view(np.float32),  # 0, -0, a denormal, infinity, two NaNs with payloads
        token_ids=np.array([-(2**31), 2**31 - 1], np.int32),
        prompt_token_ids=np.array([], np.int32),
    )
    await link.send(message)
    _, received = await setup.hub.receive(SOON_S)
    assert isinstance(received, GroupFinished)
    assert received.logprobs.view(np.uint32).tolist() == patterns.tolist()
    assert received.token_ids.tolist() == [-(2**31), 2**31 - 1]
    assert received.prompt_token_ids.dtype == np.int32
    assert len(received.prompt_token_ids) == 0
    assert received.counts == message.counts


@on_every_transport()
async def test_received_arrays_do_not_alias_sent_arrays(setup: TransportSetup):
    link = await connected_link(setup, "actor-1.0")
    token_ids = np.array([10, 11, 12], np.int32)
    await link.send(group_message(token_ids=token_ids))
    token_ids[:] = 0
    _, received = await setup.hub.receive(SOON_S)
    assert isinstance(received, GroupFinished)
    assert received.token_ids.tolist() == [10, 11, 12]
    assert not received.token_ids.flags.writeable


@on_every_transport()
async def test_replies_reach_the_right_peer(setup: TransportSetup):
    names = [f"actor-{index}.0" for index in range(12)]
    links = [await setup.link(name) for name in names]
    rounds = 20

    async def serve() -> None:
        seen = dict.fromkeys(names, 0)
        for _ in range(rounds * len(names)):
            peer, message = await setup.hub.receive(SOON_S)
            assert isinstance(message, WantWork)
            assert message.num_prompts == seen[peer]
            seen[peer] += 1
            answer = 1000 * names.index(peer) + message.num_prompts
            await offer_until_queued(setup.hub, peer, Ping(sent=answer))

    async def ask(index: int) -> None:
        for number in range(rounds):
            await links[index].send(want_work(number))
            assert await links[index].receive(SOON_S) == Ping(sent=1000 * index + number)

    await asyncio.gather(serve(), *(ask(index) for index in range(len(names))))


@on_every_transport()
async def test_malformed_input_is_rejected_without_affecting_other_peers(setup: TransportSetup):
    good = await connected_link(setup, "good-1.0")
    header, *arrays = as_bytes(group_message())
    malformed = [
        [b""],
        [b"\xc1" * 40],
        [header],
        [header, *arrays[:-1], arrays[-1][:-1]],
        [header] * 200,
    ]
    for number, frames in enumerate(malformed):
        bad = await setup.raw_peer(f"bad-{number}.0")
        await bad.send_frames(frames)
        await good.send(want_work(number))
        assert await setup.hub.receive(SOON_S) == ("good-1.0", want_work(number))
        if setup.hub.rejected == number:  # the valid message arrived first
            with pytest.raises(DeadlineExceeded):
                await setup.hub.receive(0.2)
        assert setup.hub.rejected == setup.hub.muted.num_blocked == number + 1
        assert len(setup.hub.newly_rejected) == number + 1
        answer = await bad.receive(SOON_S)
        assert isinstance(answer, Rejected)
        assert answer.reason


@on_every_transport()
async def test_rejected_peer_is_muted(setup: TransportSetup):
    good = await connected_link(setup, "good-1.0")
    bad = await setup.raw_peer("bad-1.0")
    for frames in ([b"malformed"], [b"more"], encode(Ping(sent=5)), [b""]):
        await bad.send_frames(frames)
    with pytest.raises(DeadlineExceeded):
        await setup.hub.receive(0.3)
    assert (setup.hub.rejected, setup.hub.muted.num_blocked) == (1, 1)
    assert isinstance(await bad.receive(SOON_S), Rejected)
    with pytest.raises((DeadlineExceeded, TimeoutError)):
        await bad.receive(0.1)
    await good.send(want_work(3))
    assert await setup.hub.receive(SOON_S) == ("good-1.0", want_work(3))
    setup.hub.mute("good-1.0")
    await good.send(want_work(4))
    with pytest.raises(DeadlineExceeded):
        await setup.hub.receive(0.2)
    await offer_until_queued(setup.hub, "good-1.0", Rejected(reason="because"))
    assert await good.receive(SOON_S) == Rejected(reason="because")


@on_every_transport(queued_messages=8)
async def test_malformed_flood_delays_neither_other_peers_nor_deadlines(
    setup: TransportSetup,
):
    good = await connected_link(setup, "good-1.0")
    bad = await setup.raw_peer("bad-1.0")
    flooding = True

    async def flood() -> None:
        while flooding:
            await bad.send_frames([b"malformed"])
            await asyncio.sleep(0)

    flood_task = asyncio.create_task(flood())
    try:
        for number in range(5):
            started_s = asyncio.get_running_loop().time()
            with pytest.raises(DeadlineExceeded):
                await setup.hub.receive(0.05)
            assert asyncio.get_running_loop().time() - started_s < 1.0
            await good.send(want_work(number))
            assert await setup.hub.receive(SOON_S) == ("good-1.0", want_work(number))
    finally:
        flooding = False
        draining = asyncio.create_task(setup.hub.receive(0.5))
        await flood_task
        with pytest.raises(DeadlineExceeded):
            await draining
    assert setup.hub.rejected == 1


@on_every_transport()
async def test_protocol_version_mismatch_is_rejected_with_both_versions(setup: TransportSetup):
    bad = await setup.raw_peer("old-1.0")
    header = as_bytes(Ping(sent=1))[0]
    at = header.index(b"speed_async") + len(b"speed_async")
    assert header[at] == PROTOCOL_VERSION
    await bad.send_frames([header[:at] + b"\x63" + header[at + 1 :]])
    with pytest.raises(DeadlineExceeded):
        await setup.hub.receive(0.2)
    answer = await bad.receive(SOON_S)
    assert isinstance(answer, Rejected)
    assert f"version int 99, this process uses {PROTOCOL_VERSION}" in answer.reason


@on_every_transport()
async def test_link_returns_rejected_messages(setup: TransportSetup):
    link = await connected_link(setup, "actor-1.0")
    await offer_until_queued(setup.hub, "actor-1.0", Rejected(reason="other data"))
    assert await link.receive(SOON_S) == Rejected(reason="other data")


@on_every_transport()
async def test_deadline_error_has_peer_subject_and_duration(setup: TransportSetup):
    link = await setup.link("actor-1.0")
    with pytest.raises(DeadlineExceeded, match=r"for the .*service.*: a message") as at_link:
        await link.receive(0.05)
    assert 0.05 <= at_link.value.waited_s < 1.0
    with pytest.raises(DeadlineExceeded, match=r"any peer: a message") as at_hub:
        await setup.hub.receive(0.05)
    assert 0.05 <= at_hub.value.waited_s < 1.0


@on_every_transport()
async def test_zero_deadline_never_waits(setup: TransportSetup):
    link = await connected_link(setup, "actor-1.0")
    await link.send(want_work(1))
    await link.send(want_work(2))
    assert await setup.hub.receive(SOON_S) == ("actor-1.0", want_work(1))
    async with asyncio.timeout(SOON_S):
        while True:  # the second may still be in transit
            try:
                second = await setup.hub.receive(0.0)
                break
            except DeadlineExceeded:
                await asyncio.sleep(0)
    assert second == ("actor-1.0", want_work(2))


@on_every_transport()
async def test_close_is_idempotent_and_ends_all_operations(setup: TransportSetup):
    link = await connected_link(setup, "actor-1.0")
    waiting = asyncio.ensure_future(link.receive(SOON_S))
    serving = asyncio.ensure_future(setup.hub.receive(SOON_S))
    await asyncio.sleep(0)
    await link.close()
    await link.close()
    with pytest.raises(TransportClosed):
        await waiting
    with pytest.raises(TransportClosed):
        await link.send(want_work(1))
    await setup.hub.close()
    await setup.hub.close()
    with pytest.raises(TransportClosed):
        await serving
    with pytest.raises(TransportClosed):
        await offer_until_queued(setup.hub, "actor-1.0", Ping(sent=1))


@on_every_transport()
async def test_closing_a_link_flushes_its_messages(setup: TransportSetup):
    link = await setup.link("actor-1.0")
    for number in range(40):
        await link.send(want_work(number))
    await link.close()
    received = [await setup.hub.receive(SOON_S) for _ in range(40)]
    assert received == [("actor-1.0", want_work(number)) for number in range(40)]


@on_every_transport()
async def test_closing_the_hub_flushes_its_messages(setup: TransportSetup):
    link = await connected_link(setup, "actor-1.0")
    for number in range(40):
        await offer_until_queued(setup.hub, "actor-1.0", Ping(sent=number))
    await setup.hub.close()
    received = [await link.receive(SOON_S) for _ in range(40)]
    assert received == [Ping(sent=number) for number in range(40)]


@on_every_transport()
async def test_sending_to_a_disconnected_peer_is_not_an_error(setup: TransportSetup):
    await offer_until_queued(setup.hub, "never-1.0", Ping(sent=1))
    assert setup.hub.undelivered == 1
    gone = await connected_link(setup, "gone-1.0")
    stays = await connected_link(setup, "stays-1.0")
    await gone.close()
    async with asyncio.timeout(SOON_S):
        while setup.hub.undelivered < 2:  # disconnects are detected asynchronously
            await offer_until_queued(setup.hub, "gone-1.0", Ping(sent=1))
            await asyncio.sleep(0)
    await offer_until_queued(setup.hub, "stays-1.0", Ping(sent=2))
    assert await stays.receive(SOON_S) == Ping(sent=2)


@on_every_transport()
async def test_reconnected_peer_keeps_its_name(setup: TransportSetup):
    old = await connected_link(setup, "actor-1.0")
    await old.close()
    async with asyncio.timeout(SOON_S):
        while await offer_until_queued(setup.hub, "actor-1.0", Ping(sent=8)) is not Delivery.GONE:  # noqa: ASYNC110
            await asyncio.sleep(0)  # disconnects are detected asynchronously
    new = await connected_link(setup, "actor-1.0")
    await offer_until_queued(setup.hub, "actor-1.0", Ping(sent=9))
    assert await new.receive(SOON_S) == Ping(sent=9)


@on_every_transport()
async def test_fifty_megabytes_are_transferred_in_both_directions(setup: TransportSetup):
    link = await connected_link(setup, "actor-1.0")
    num_tokens = 50_000_000 // 12
    arrays = {
        "token_ids": np.arange(num_tokens, dtype=np.int32),
        "logprobs": np.arange(num_tokens, dtype=np.float32),
        "policy_versions": np.arange(num_tokens, dtype=np.int32),
    }
    _, (_, received) = await asyncio.gather(
        link.send(group_message(**arrays)), setup.hub.receive(SOON_S)
    )
    assert isinstance(received, GroupFinished)
    _, returned = await asyncio.gather(
        offer_until_queued(setup.hub, "actor-1.0", received), link.receive(SOON_S)
    )
    assert isinstance(returned, GroupFinished)
    for name, array in arrays.items():
        assert np.array_equal(getattr(returned, name), array)


def megabyte(number: int) -> GroupFinished:
    quarter = np.full(262_144, number, np.int32)
    one = np.array([1], np.int32)
    return GroupFinished(
        counts=ActorCounts(),
        lease_id=number,
        prompt_id=1,
        num_screening=1,
        prompt_token_ids=one,
        lengths=one,
        rewards=np.array([1.0], np.float32),
        passed=np.array([1], np.int32),
        cut=np.zeros(1, np.int32),
        token_ids=quarter,
        logprobs=np.array([-1.0], np.float32),
        policy_versions=one,
    )


async def fill(send) -> tuple[int, DeadlineExceeded]:
    """Send until the queue is full; returns the number of sent messages and the error."""
    for number in range(100):
        try:
            await send(megabyte(number))
        except DeadlineExceeded as error:
            return number, error
    pytest.fail("100 MB were accepted without a reader")


@on_every_transport(queued_messages=4, send_deadline_s=0.5)
async def test_link_to_a_slow_hub_uses_bounded_memory(setup: TransportSetup):
    link = await connected_link(setup, "actor-1.0")
    num_sent, error = await fill(link.send)
    assert "service" in error.peer
    assert error.what.endswith("box")
    assert error.waited_s >= 0.5
    for number in range(num_sent):
        _, message = await setup.hub.receive(SOON_S)
        assert isinstance(message, GroupFinished)
        assert message.token_ids[-1] == number
    await link.send(want_work(1))
    assert await setup.hub.receive(SOON_S) == ("actor-1.0", want_work(1))


@on_every_transport(queued_messages=4)
async def test_full_queue_of_a_slow_link_does_not_block_others(setup: TransportSetup):
    slow = await connected_link(setup, "slow-1.0")
    quick = await connected_link(setup, "quick-1.0")
    num_sent = 0
    while setup.hub.offer("slow-1.0", megabyte(num_sent)) is Delivery.QUEUED:
        num_sent += 1
        await asyncio.sleep(0.01)  # system buffers may accept some messages
        assert num_sent < 100, "100 MB were accepted without a reader"
    assert num_sent >= 4
    for number in range(200):
        await offer_until_queued(setup.hub, "quick-1.0", Ping(sent=number))
        assert await quick.receive(SOON_S) == Ping(sent=number)
    for number in range(num_sent):
        message = await slow.receive(SOON_S)
        assert isinstance(message, GroupFinished)
        assert message.token_ids[-1] == number
    await offer_until_queued(setup.hub, "slow-1.0", Welcome(policy_version=1))
    assert await slow.receive(SOON_S) == Welcome(policy_version=1)


@on_every_transport()
async def test_cancelled_receive_loses_no_message(setup: TransportSetup):
    link = await connected_link(setup, "actor-1.0")
    received = []
    for number in range(100):
        receiving = asyncio.ensure_future(setup.hub.receive(SOON_S))
        await asyncio.sleep(0)
        await link.send(want_work(number))
        receiving.cancel()
        outcome = (await asyncio.gather(receiving, return_exceptions=True))[0]
        if not isinstance(outcome, BaseException):
            _, message = outcome
            assert isinstance(message, WantWork)
            received.append(message.num_prompts)
    while len(received) < 100:
        _, message = await setup.hub.receive(SOON_S)
        assert isinstance(message, WantWork)
        received.append(message.num_prompts)
    assert received == list(range(100))


@on_every_transport()
async def test_invalid_messages_are_rejected_before_sending(setup: TransportSetup):
    link = await connected_link(setup, "actor-1.0")
    with pytest.raises(ProtocolError, match="num_prompts must be int"):
        await link.send(want_work("3"))  # type: ignore
    with pytest.raises(ProtocolError, match="sent must be int"):
        await offer_until_queued(setup.hub, "actor-1.0", Ping(sent=1.5))  # type: ignore
