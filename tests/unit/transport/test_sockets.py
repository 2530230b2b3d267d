"""PolledSocket: no lost wake-ups, and no starvation of the event loop."""

import asyncio
from collections.abc import Sequence

import pytest
import uvloop
import zmq

from speed_async.transport.codec import Frame
from speed_async.transport.sockets import PolledSocket

SOON_S = 5.0
# A waiter that missed its signal wakes only at its deadline; these waits must end earlier.
WAIT = {"deadline_s": 2 * SOON_S, "peer": "the peer", "what": "a message"}


class ConsumedSignal(PolledSocket):
    """The first attempt fails after another operation consumed the signal of the descriptor."""

    attempts = 0

    def _receive_now(self) -> list[Frame]:
        self._fail_once(zmq.POLLIN)
        return super()._receive_now()

    def send_now(self, frames: Sequence[Frame]) -> None:
        self._fail_once(zmq.POLLOUT)
        super().send_now(frames)

    def _fail_once(self, event: int) -> None:
        self.attempts += 1
        if self.attempts == 1:
            assert self.raw.poll(int(SOON_S * 1000), event)  # polling consumes the signal
            raise zmq.Again


class NeverEmpty(PolledSocket):
    def _receive_now(self) -> list[Frame]:
        return [b"more"]


def pair_of(socket_type: type[PolledSocket]) -> tuple[PolledSocket, PolledSocket]:
    """Connect a socket under test to a plain socket."""
    tested = socket_type(zmq.DEALER, outbox_messages=4, inbox_messages=4)
    plain = PolledSocket(zmq.DEALER, outbox_messages=4, inbox_messages=4)
    port = tested.raw.bind_to_random_port("tcp://127.0.0.1")
    plain.raw.connect(f"tcp://127.0.0.1:{port}")
    return tested, plain


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_receiver_wakes_after_its_signal_was_consumed(run):
    async def run_test() -> None:
        tested, plain = pair_of(ConsumedSignal)
        await plain.send([b"hello"], **WAIT)
        async with asyncio.timeout(SOON_S):
            assert [bytes(frame) for frame in await tested.receive(**WAIT)] == [b"hello"]
        await plain.close()
        await tested.close()

    run(run_test())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_sender_wakes_after_its_signal_was_consumed(run):
    async def run_test() -> None:
        tested, plain = pair_of(ConsumedSignal)
        async with asyncio.timeout(SOON_S):
            await tested.send([b"hello"], **WAIT)
        assert [bytes(frame) for frame in await plain.receive(**WAIT)] == [b"hello"]
        await plain.close()
        await tested.close()

    run(run_test())


def test_busy_socket_yields_to_other_tasks():
    async def run_test() -> None:
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        tested, plain = pair_of(NeverEmpty)
        counting = asyncio.ensure_future(count_turns())
        for _ in range(10 * 32):
            await tested.receive(**WAIT)
        counting.cancel()
        assert turns >= 5
        await plain.close()
        await tested.close()

    asyncio.run(run_test())
