"""Applies an offered policy version to the engine, and reports the outcome to the service."""

from collections.abc import Callable

from speed_async.actors.engine import Engine
from speed_async.errors import DeadlineExceeded, SpeedAsyncError, WeightSyncError
from speed_async.transport import messages as m
from speed_async.types import ActorCounts, WeightOffer


async def apply_offer(
    engine: Engine,
    offer: WeightOffer,
    *,
    counts: Callable[[], ActorCounts],
    is_draining: Callable[[], bool],
) -> m.WeightsApplied:
    """Receive the offered version. A failure is in the report.

    While the actor drains, its engine counts as usable: it samples no more.
    """
    version, error, usable = offer.policy_version, "", True
    pause_s = transfer_s = 0.0
    try:
        report = await engine.update_weights(offer)
        pause_s, transfer_s = report.pause_s, report.transfer_s
    except (WeightSyncError, DeadlineExceeded) as failure:
        version, error = -1, str(failure)
        usable = is_draining() or await _is_usable(engine)
    return m.WeightsApplied(
        policy_version=version,
        epoch=offer.epoch,
        pause_s=pause_s,
        transfer_s=transfer_s,
        error=error,
        usable=usable,
        counts=counts(),
    )


async def _is_usable(engine: Engine) -> bool:
    """Whether the engine still holds a valid version after a failed update."""
    try:
        await engine.resume()
    except SpeedAsyncError:
        return False
    return True
