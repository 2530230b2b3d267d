"""Reports of offered versions: applied, rejected, and rejected by an engine without weights."""

import asyncio

from speed_async.actors.stepped_engine.engine import SteppedEngine
from speed_async.actors.stepped_engine.worker import ThreadWorker
from speed_async.actors.weight_update import apply_offer
from speed_async.errors import WeightSyncError
from speed_async.testing.scripted_engine import ScriptedStepper
from speed_async.transport import messages as m
from speed_async.types import ActorCounts, WeightOffer
from tests.fakes.engine_contract import offer

COUNTS = ActorCounts(tokens_generated=7)


def applied(
    *, fails: bool, has_valid_weights: bool = True, draining: bool = False
) -> m.WeightsApplied:
    """The report of an engine whose transfer of version 5 takes 0.25 s or fails."""

    def receive(offer: WeightOffer) -> float:
        if fails:
            raise WeightSyncError("rank 0 is gone")
        return 0.25

    def make_stepper() -> ScriptedStepper:
        return ScriptedStepper(
            lambda request, number: [1],
            num_slots=1,
            context_length=8,
            receive=receive,
            has_valid_weights=lambda: has_valid_weights,
        )

    async def run() -> m.WeightsApplied:
        async with SteppedEngine(ThreadWorker(make_stepper)) as engine:
            return await apply_offer(
                engine, offer(5), counts=lambda: COUNTS, is_draining=lambda: draining
            )

    return asyncio.run(asyncio.wait_for(run(), 30))


def test_an_applied_version_is_reported_with_its_times() -> None:
    report = applied(fails=False)
    assert (report.policy_version, report.epoch, report.error, report.usable) == (5, 0, "", True)
    assert report.transfer_s == 0.25
    assert report.counts == COUNTS


def test_a_failed_transfer_keeps_the_old_version() -> None:
    report = applied(fails=True)
    assert (report.policy_version, report.usable) == (-1, True)
    assert report.error == "rank 0 is gone"


def test_an_engine_without_weights_is_unusable_unless_it_drains() -> None:
    for draining in (False, True):
        report = applied(fails=True, has_valid_weights=False, draining=draining)
        assert (report.policy_version, report.usable) == (-1, draining)
