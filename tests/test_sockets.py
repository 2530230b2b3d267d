"""The polled socket's own promises: no lost wake-up, and no starving of the loop."""

import asyncio
from collections.abc import Sequence

import pytest
import uvloop
import zmq

from speed_async.transport.codec import Frame
from speed_async.transport.sockets import PolledSocket

SOON_S = 5.0
# A sleeper that missed its signal is only helped by its deadline; these waits end before that.
WAIT = {"deadline_s": 2 * SOON_S, "whom": "the peer", "what": "a message"}


class EatenSignal(PolledSocket):
    """Its first try fails, and by then another operation has consumed the descriptor's signal."""

    tries = 0

    def _receive_now(self) -> list[Frame]:
        self._fail_once(zmq.POLLIN)
        return super()._receive_now()

    def send_now(self, frames: Sequence[Frame]) -> None:
        self._fail_once(zmq.POLLOUT)
        super().send_now(frames)

    def _fail_once(self, event: int) -> None:
        self.tries += 1
        if self.tries == 1:
            assert self.raw.poll(int(SOON_S * 1000), event)  # polling processes what was signalled
            raise zmq.Again


class NeverEmpty(PolledSocket):
    def _receive_now(self) -> list[Frame]:
        return [b"more"]


def pair_of(kind: type[PolledSocket]) -> tuple[PolledSocket, PolledSocket]:
    """A socket under test and a plain one, connected."""
    tested = kind(zmq.DEALER, outbox_messages=4, inbox_messages=4)
    plain = PolledSocket(zmq.DEALER, outbox_messages=4, inbox_messages=4)
    port = tested.raw.bind_to_random_port("tcp://127.0.0.1")
    plain.raw.connect(f"tcp://127.0.0.1:{port}")
    return tested, plain


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_receiver_wakes_although_its_signal_was_consumed_before_it_slept(run):
    async def play() -> None:
        tested, plain = pair_of(EatenSignal)
        await plain.send([b"hello"], **WAIT)
        async with asyncio.timeout(SOON_S):
            assert [bytes(frame) for frame in await tested.receive(**WAIT)] == [b"hello"]
        await plain.close()
        await tested.close()

    run(play())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_sender_wakes_although_its_signal_was_consumed_before_it_slept(run):
    async def play() -> None:
        tested, plain = pair_of(EatenSignal)
        async with asyncio.timeout(SOON_S):
            await tested.send([b"hello"], **WAIT)
        assert [bytes(frame) for frame in await plain.receive(**WAIT)] == [b"hello"]
        await plain.close()
        await tested.close()

    run(play())


def test_a_socket_that_never_runs_dry_lets_other_tasks_run():
    async def play() -> None:
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

    asyncio.run(play())
