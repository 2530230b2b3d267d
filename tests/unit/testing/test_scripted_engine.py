"""The scripted engine: the engine contract, scripts and recorded calls."""

import asyncio

import pytest

from speed_async.errors import WeightSyncError
from speed_async.testing.scripted_engine import SCRIPTED_LOGPROB, ScriptedEngine
from tests.fakes.engine_contract import (
    CONTRACT,
    NUM_TOKEN_IDS,
    StartEngine,
    contract_script,
    gather,
    offer,
    request,
    start_all,
    until,
)


def start() -> ScriptedEngine:
    return ScriptedEngine(
        contract_script,
        num_slots=2,
        context_length=96,
        num_token_ids=NUM_TOKEN_IDS,
    )


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_scripted_engine_satisfies_the_contract(check) -> None:
    asyncio.run(check(start))


def test_script_determines_tokens_and_finish_reason() -> None:
    async def run() -> None:
        scripts = [[5, 6, 2], [7] * 10]
        async with ScriptedEngine(lambda request, index: scripts[index]) as engine:
            first, second = await gather(start_all(engine, [request(4), request(4)]))
        assert first.token_ids.tolist() == [5, 6, 2] and first.finish_reason == "stop"
        assert second.token_ids.tolist() == [7, 7, 7, 7] and second.finish_reason == "length"
        assert first.logprobs.tolist() == [SCRIPTED_LOGPROB] * 3

    asyncio.run(run())


def test_all_calls_are_recorded() -> None:
    async def run() -> None:
        async with start() as engine:
            sent = request(2)
            await gather(start_all(engine, [sent]))
            await engine.update_weights(offer(3))
            await engine.pause(abort=True)
            await engine.resume()
        assert engine.requests == [sent] and engine.offers == [offer(3)]
        assert engine.pauses == [True] and engine.num_resumes == 1

    asyncio.run(run())


def test_error_in_a_step_fails_all_current_and_later_calls() -> None:
    def script(request, index: int) -> list[int]:
        if index == 1:
            raise ZeroDivisionError("scripted")
        return [9] * 200

    async def run() -> None:
        async with ScriptedEngine(script, num_slots=2, context_length=96) as engine:
            [running] = start_all(engine, [request(90)])
            await until(engine, lambda: engine.stats.num_running == 1)
            [failing, waiting] = start_all(engine, [request(3), request(3)])
            for task in (running, failing, waiting):
                with pytest.raises(ZeroDivisionError, match="scripted"):
                    await gather([task])
            with pytest.raises(ZeroDivisionError, match="scripted"):
                await engine.generate(request(3))
            with pytest.raises(ZeroDivisionError, match="scripted"):
                await engine.update_weights(offer(1))

    asyncio.run(run())


def test_failed_update_keeps_the_old_version() -> None:
    def receive(offer) -> float:
        raise WeightSyncError("no sender")

    async def run(start: StartEngine) -> None:
        async with start() as engine:
            with pytest.raises(WeightSyncError, match="no sender"):
                await engine.update_weights(offer(1))
            [sampled] = await gather(start_all(engine, [request(2)]))
        assert sampled.policy_versions.tolist() == [0, 0]

    asyncio.run(run(lambda: ScriptedEngine(lambda request, index: [9] * 9, receive=receive)))
