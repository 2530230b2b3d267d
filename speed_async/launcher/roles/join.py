"""How a supervisor finds the service of a run, and how it hears that the run has ended.

consumes   the service's answer to Join, then the metrics feed, for the run's end
waits for  the answer (cluster.connect_timeout_s), the feed's next event (cluster.peer_timeout_s)
"""

import asyncio
import os
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from speed_async.errors import DeadlineExceeded, LostRun, ProtocolError, SpeedAsyncError
from speed_async.transport import messages as m
from speed_async.transport.curve import ClientKeys
from speed_async.transport.feed import FeedSubscriber
from speed_async.transport.joining import Join, JoinAccepted
from speed_async.transport.transport import Link
from speed_async.transport.zeromq import open_link

ASK_AGAIN_S = 5.0
"""A service that was killed with the question unanswered, or whose address was an old one, is asked
once more."""
LOOK_AGAIN_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnd:
    outcome: str
    """"completed", "stopped", "nothing_learned" or "failed" (observability/metrics.py)."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Admitted:
    """A place in a run, and the link over which it was given; who has it closes it."""

    host: str
    port: int
    accepted: JoinAccepted
    link: Link


async def ask_for_place(
    where: Callable[[], tuple[str, int] | None],
    *,
    stopping: asyncio.Event,
    timeout_s: float,
    keys: ClientKeys | None,
    rank: int | None = None,
) -> Admitted | None:
    """Ask the service at `where()` (None: not known yet) until it answers.

    `rank`: of an actor that a launcher started. None when a stop comes first. Raises
    DeadlineExceeded, ProtocolError, what `where` raises, or SpeedAsyncError when it refuses.
    """
    clock = asyncio.get_running_loop().time
    ends_s = clock() + timeout_s
    asked = ""
    while not stopping.is_set():
        left_s = ends_s - clock()
        if left_s <= 0:
            raise DeadlineExceeded(asked or "the learner (rank 0)", "the run's address", timeout_s)
        address = where()
        if address is None:
            await _sleep(stopping, LOOK_AGAIN_S)
            continue
        host, port = address
        asked = f"a run at tcp://{host}:{port}"
        name = f"join-{uuid.uuid4().hex}"
        link = await open_link(
            host, port, name if rank is None else f"actor-{rank}.{name}", keys=keys
        )
        accepted = None
        try:
            accepted = await _ask(link, stopping, asked, min(left_s, ASK_AGAIN_S), rank)
            if accepted is not None:
                return Admitted(host=host, port=port, accepted=accepted, link=link)
        finally:
            if accepted is None:
                await link.close()
    return None


async def until_end(feed: FeedSubscriber, silence_s: float) -> RunEnd:
    """Return at the run's last event. Raises LostRun when the feed is silent for `silence_s`."""
    while True:
        try:
            event = await feed.receive(silence_s)
        except DeadlineExceeded as error:
            raise LostRun(
                f"lost the run: nothing was heard of {error.whom} for {silence_s:.0f} s; its "
                "machine, its launcher or the network is gone"
            ) from None
        if event.kind == "end":
            fallback = "completed" if event.values.get("ok") is True else "failed"
            outcome = str(event.values.get("outcome") or fallback)
            return RunEnd(outcome=outcome, reason=str(event.values.get("reason")))


async def _ask(
    link: Link, stopping: asyncio.Event, whom: str, timeout_s: float, rank: int | None
) -> JoinAccepted | None:
    """The service's answer; None when none came, or a stop comes first."""
    join = Join(
        machine=socket.gethostname() or "unnamed",
        process_id=os.getpid(),
        has_rank=rank is not None,
        rank=rank or 0,
    )
    await link.send(join)
    answering = asyncio.create_task(link.receive(timeout_s), name="answer")
    stop = asyncio.create_task(stopping.wait(), name="stop")
    await asyncio.wait((answering, stop), return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not answering.done():
        answering.cancel()
        return None
    try:
        answer = await answering
    except DeadlineExceeded:
        return None
    except ProtocolError as error:
        raise ProtocolError(f"{whom} speaks another protocol: {error}") from None
    if isinstance(answer, m.Rejected):
        raise SpeedAsyncError(f"{whom} does not take this actor: {answer.reason}")
    if not isinstance(answer, JoinAccepted):
        raise ProtocolError(f"{whom} answered Join with {type(answer).__name__}")
    return answer


async def _sleep(stopping: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stopping.wait(), seconds)
    except TimeoutError:
        return
