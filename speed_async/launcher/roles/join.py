"""How a supervisor joins a run and detects its end.

consumes   the service's reply to Join, then the metrics feed (for the end event)
waits for  the reply (cluster.connect_timeout_s), the feed's next event (cluster.peer_timeout_s)
"""

import asyncio
import os
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from speed_async.errors import DeadlineExceeded, ProtocolError, RunLost, SpeedAsyncError
from speed_async.launcher.ports import address_at, listens
from speed_async.launcher.standard_streams import STDERR, write_stream
from speed_async.transport import messages as m
from speed_async.transport.curve import ClientKeys
from speed_async.transport.feed import FeedSubscriber
from speed_async.transport.joining import Join, JoinAccepted
from speed_async.transport.transport import Link
from speed_async.transport.zeromq import open_link

ASK_AGAIN_S = 5.0
"""Join is sent again after this: the service may have been killed, or the address be outdated."""
LOOK_UP_AGAIN_S = 0.1
PROBE_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnd:
    outcome: str
    """"completed", "stopped", "nothing_learned" or "failed" (observability/metrics.py)."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Admitted:
    """An accepted Join, and the link it arrived on; the caller closes the link."""

    host: str
    port: int
    accepted: JoinAccepted
    link: Link


async def request_admission(
    look_up: Callable[[], tuple[str, int] | None],
    *,
    stopping: asyncio.Event,
    timeout_s: float,
    keys: ClientKeys | None,
    rank: int | None = None,
) -> Admitted | None:
    """Send Join to the service at `look_up()` (None: not known yet) until it replies.

    Writes one line to stderr if there is no reply within ASK_AGAIN_S.

    `rank`: rank of an actor started by a launcher. Returns None when `stopping` is set first.
    Raises DeadlineExceeded, ProtocolError, any error of `look_up`, or SpeedAsyncError when the
    service rejects the actor.
    """
    clock = asyncio.get_running_loop().time
    ends_s = clock() + timeout_s
    service, is_silent = "", False
    while not stopping.is_set():
        left_s = ends_s - clock()
        if left_s <= 0:
            peer = service or "the learner (rank 0)"
            raise DeadlineExceeded(peer, "the run's address", timeout_s)
        address = look_up()
        if address is None:
            await _sleep(stopping, LOOK_UP_AGAIN_S)
            continue
        host, port = address
        service = f"a run at {address_at(host, port)}"
        name = f"join-{uuid.uuid4().hex}"
        link = await open_link(
            host, port, name if rank is None else f"actor-{rank}.{name}", keys=keys
        )
        accepted = None
        try:
            accepted = await _request(link, stopping, service, min(left_s, ASK_AGAIN_S), rank)
            if accepted is not None:
                return Admitted(host=host, port=port, accepted=accepted, link=link)
        finally:
            if accepted is None:
                await link.close()
        if not is_silent and not stopping.is_set() and (left_s := ends_s - clock()) > 0:
            is_silent = True
            why = await describe_silence(host, port)
            write_stream(f"{service} has not replied: {why}; waiting {left_s:.0f} s more\n", STDERR)
    return None


async def describe_silence(host: str, port: int) -> str:
    """Whether there is a process at an address that does not reply to Join."""
    if await listens(host, port, timeout_s=PROBE_S):
        return "a process accepts connections there, which may be another program"
    return "no process accepts connections there"


async def wait_for_run_end(feed: FeedSubscriber, silence_s: float) -> RunEnd:
    """Wait for the end event of the run. Raises RunLost when the feed is silent for `silence_s`."""
    while True:
        try:
            event = await feed.receive(silence_s)
        except DeadlineExceeded as error:
            raise RunLost(
                f"lost the run: no event from {error.peer} for {silence_s:.0f} s; its machine, "
                "its launcher or the network is down"
            ) from None
        if event.kind == "end":
            fallback = "completed" if event.values.get("ok") is True else "failed"
            outcome = str(event.values.get("outcome") or fallback)
            return RunEnd(outcome=outcome, reason=str(event.values.get("reason")))


async def _request(
    link: Link, stopping: asyncio.Event, service: str, timeout_s: float, rank: int | None
) -> JoinAccepted | None:
    """Send Join and return the reply; None on timeout or when `stopping` is set first."""
    join = Join(
        machine=socket.gethostname() or "unnamed",
        process_id=os.getpid(),
        has_rank=rank is not None,
        rank=rank or 0,
    )
    try:
        await asyncio.wait_for(link.send(join), timeout_s)
    except TimeoutError:  # after a failed handshake there is no connection to queue it for
        return None
    receiving = asyncio.create_task(link.receive(timeout_s), name="reply")
    stop = asyncio.create_task(stopping.wait(), name="stop")
    await asyncio.wait((receiving, stop), return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not receiving.done():
        receiving.cancel()
        return None
    try:
        reply = await receiving
    except DeadlineExceeded:
        return None
    except ProtocolError as error:
        raise ProtocolError(f"{service} uses a different protocol: {error}") from None
    if isinstance(reply, m.Rejected):
        raise SpeedAsyncError(f"{service} rejected this actor: {reply.reason}")
    if not isinstance(reply, JoinAccepted):
        raise ProtocolError(f"{service} replied to Join with {type(reply).__name__}")
    return reply


async def _sleep(stopping: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stopping.wait(), seconds)
    except TimeoutError:
        return
