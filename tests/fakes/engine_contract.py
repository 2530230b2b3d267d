"""The contract of all engines; the test file of each engine runs every check in CONTRACT.

`start()` creates an engine, not entered yet, with two slots, a context of 96 tokens and the
vocabulary of the tiny models. Its completions do not stop before `max_new_tokens`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import pytest

from speed_async.actors.engine import GenerationRequest, ManagedEngine
from speed_async.errors import ConfigError, ModelError, SpeedAsyncError
from speed_async.types import Sampled, WeightOffer
from tests.fakes.tiny_models import VOCABULARY

CONTEXT_LENGTH = 96
NUM_TOKEN_IDS = len(VOCABULARY)
WAIT_S = 300.0


class StartEngine(Protocol):
    def __call__(self) -> ManagedEngine: ...


def request(max_new_tokens: int, *, priority: int = 0, num_prompt: int = 5) -> GenerationRequest:
    return GenerationRequest(
        prompt_token_ids=np.arange(4, 4 + num_prompt, dtype=np.int32) % 40,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        top_p=1.0,
        priority=priority,
    )


def contract_script(request: GenerationRequest, num_earlier: int) -> list[int]:
    """Tokens of a scripted engine: those of the request's seed, and constant at temperature 0."""
    if request.temperature == 0:
        return [9] * 200
    seed = num_earlier if request.seed is None else request.seed
    return np.random.default_rng(seed).integers(4, NUM_TOKEN_IDS, 200).tolist()


def offer(policy_version: int) -> WeightOffer:
    return WeightOffer(
        policy_version=policy_version,
        epoch=0,
        rank=1,
        world_size=2,
        store_host="127.0.0.1",
        store_port=1,
        backend="gloo",
        deadline_s=WAIT_S,
    )


async def until(engine: ManagedEngine, condition: Callable[[], bool]) -> None:
    """Wait until `condition()` holds; checks once per event loop iteration."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 (the engine has no event for its own counts)
            await asyncio.sleep(0)


def start_all(engine: ManagedEngine, requests: list[GenerationRequest]) -> list[asyncio.Task]:
    return [asyncio.create_task(engine.generate(one)) for one in requests]


async def gather(tasks: list[asyncio.Task]) -> list[Sampled]:
    async with asyncio.timeout(WAIT_S):
        return await asyncio.gather(*tasks)


async def completion_has_requested_length_and_versions(start: StartEngine) -> None:
    async with start() as engine:
        [sampled] = await gather(start_all(engine, [request(7)]))
    assert sampled.num_tokens == 7 and sampled.finish_reason == "length"
    assert sampled.token_ids.dtype == np.int32 and sampled.token_ids.shape == (7,)
    assert sampled.logprobs.dtype == np.float32 and (sampled.logprobs < 0).all()
    assert sampled.policy_versions.tolist() == [0] * 7


async def more_requests_than_slots_all_complete(start: StartEngine) -> None:
    lengths = [1, 9, 3, 30, 2, 2, 17, 5]
    async with start() as engine:
        results = await gather(start_all(engine, [request(length) for length in lengths]))
        stats = engine.stats
    assert [sampled.num_tokens for sampled in results] == lengths
    assert stats.tokens_generated == sum(lengths)
    assert (stats.tokens_running, stats.num_running, stats.num_waiting) == (0, 0, 0)


async def requests_are_served_by_priority_then_fifo(start: StartEngine) -> None:
    order: list[str] = []

    async def named(engine: ManagedEngine, name: str, priority: int) -> None:
        await engine.generate(request(4, priority=priority))
        order.append(name)

    async with start() as engine:
        await engine.pause(abort=False)
        names = [("screen-1", 1), ("screen-2", 1), ("continue-1", 0), ("continue-2", 0)]
        tasks = [asyncio.create_task(named(engine, *each)) for each in names]
        await until(engine, lambda: engine.stats.num_waiting == 4)
        await engine.resume()
        await gather(tasks)
    assert order == ["continue-1", "continue-2", "screen-1", "screen-2"]


async def max_new_tokens_is_limited_by_context_length(start: StartEngine) -> None:
    async with start() as engine:
        [sampled] = await gather(start_all(engine, [request(500, num_prompt=90)]))
    assert sampled.num_tokens == CONTEXT_LENGTH - 90 and sampled.finish_reason == "length"


async def invalid_requests_raise_immediately(start: StartEngine) -> None:
    async with start() as engine:
        with pytest.raises(ModelError, match="96 tokens and the context holds 96"):
            await engine.generate(request(4, num_prompt=CONTEXT_LENGTH))
        with pytest.raises(ConfigError, match="max_new_tokens"):
            await engine.generate(request(0))
        assert engine.stats.tokens_generated == 0


async def out_of_vocabulary_token_id_fails_only_its_request(
    start: StartEngine,
) -> None:
    invalid = replace(request(4), prompt_token_ids=np.array([4, 5, NUM_TOKEN_IDS], np.int32))
    highest = replace(invalid, prompt_token_ids=np.array([4, 5, NUM_TOKEN_IDS - 1], np.int32))
    async with start() as engine:
        running = start_all(engine, [request(20)])
        with pytest.raises(ModelError, match=f"token id {NUM_TOKEN_IDS} .* {NUM_TOKEN_IDS} token"):
            await engine.generate(invalid)
        results = await gather(running + start_all(engine, [highest]))
    assert [sampled.num_tokens for sampled in results] == [20, 4]


async def token_counts_are_always_consistent(start: StartEngine) -> None:
    returned = 0

    async def count(engine: ManagedEngine, length: int) -> None:
        nonlocal returned
        sampled = await engine.generate(request(length))
        returned += sampled.num_tokens

    async with start() as engine:
        tasks = [asyncio.create_task(count(engine, 3 + 2 * i)) for i in range(10)]
        cancelled = [asyncio.create_task(count(engine, 80)) for _ in range(4)]
        num_checks = 0
        async with asyncio.timeout(WAIT_S):
            while not all(task.done() for task in tasks + cancelled):
                stats = engine.stats
                counted = returned + engine.tokens_cancelled + stats.tokens_running
                assert stats.tokens_generated == counted
                num_checks += 1
                if all(task.done() for task in tasks) and stats.tokens_running > 20:
                    for task in cancelled:
                        task.cancel()
                await asyncio.sleep(0)
        await until(engine, lambda: engine.stats.num_running == 0)
        assert num_checks > 20 and engine.tokens_cancelled > 20
        assert engine.stats.tokens_generated == returned + engine.tokens_cancelled


async def cancellation_frees_the_slot(start: StartEngine) -> None:
    async with start() as engine:
        running = start_all(engine, [request(90), request(90)])
        await until(engine, lambda: engine.stats.num_running == 2)
        [waiting] = start_all(engine, [request(3)])
        running[0].cancel()
        await gather([waiting])
        assert not running[1].done(), "the short request must run concurrently with the long one"
        running[1].cancel()
        await until(engine, lambda: engine.stats.num_running == 0)
        assert engine.stats.num_waiting == 0


async def cancelled_waiting_request_never_runs(start: StartEngine) -> None:
    async with start() as engine:
        await engine.pause(abort=False)
        first, second = start_all(engine, [request(3), request(3)])
        await until(engine, lambda: engine.stats.num_waiting == 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await engine.resume()
        await gather([second])
        assert engine.stats.tokens_generated == 3


async def pause_with_abort_returns_partial_completions(start: StartEngine) -> None:
    async with start() as engine:
        running = start_all(engine, [request(80), request(80)])
        await until(engine, lambda: engine.stats.num_running == 2)
        waiting = start_all(engine, [request(80)])
        await until(engine, lambda: engine.stats.tokens_running >= 6)
        async with asyncio.timeout(WAIT_S):
            await engine.pause(abort=True)
        results = await gather(running + waiting)
        assert [sampled.finish_reason for sampled in results] == ["abort"] * 3
        assert results[0].num_tokens >= 3 and results[2].num_tokens == 0
        assert engine.stats.tokens_generated == sum(sampled.num_tokens for sampled in results)
        await engine.resume()
        [after] = await gather(start_all(engine, [request(2)]))
        assert after.finish_reason == "length"


async def no_token_is_sampled_while_paused(start: StartEngine) -> None:
    async with start() as engine:
        [task] = start_all(engine, [request(60)])
        await until(engine, lambda: engine.stats.tokens_running > 2)
        await engine.pause(abort=False)
        before = engine.stats.tokens_generated
        # An update takes a full iteration of the worker thread, which would include a step.
        for version in (1, 2, 3):
            await engine.update_weights(offer(version))
        assert engine.stats.tokens_generated == before and not task.done()
        await engine.resume()
        [sampled] = await gather([task])
        assert sampled.num_tokens == 60
        assert sorted(set(sampled.policy_versions.tolist())) == [0, 3]


async def update_in_flight_changes_the_version_once(start: StartEngine) -> None:
    async with start() as engine:
        tasks = start_all(engine, [request(80), request(85), request(5)])
        await until(engine, lambda: engine.stats.tokens_running > 10)
        async with asyncio.timeout(WAIT_S):
            report = await engine.update_weights(offer(7))
        assert engine.stats.policy_version == 7
        assert report.policy_version == 7 and report.pause_s >= report.transfer_s >= 0
        results = await gather(tasks)
    for sampled in results[:2]:
        versions = sampled.policy_versions.tolist()
        assert versions == sorted(versions) and set(versions) == {0, 7}
    assert set(results[2].policy_versions.tolist()) <= {0, 7}


async def update_aborts_stale_requests(start: StartEngine) -> None:
    async with start() as engine:
        unbounded = replace(request(85), max_staleness=None)
        bounded = replace(request(85), max_staleness=1)
        running = start_all(engine, [unbounded, bounded])
        await until(engine, lambda: engine.stats.num_running == 2)
        await engine.pause(abort=False)
        waiting = start_all(
            engine,
            [
                replace(request(3), max_staleness=1, oldest_version=0),  # stale group
                replace(request(3), max_staleness=1),  # no tokens yet
            ],
        )
        await engine.update_weights(offer(1))
        assert not any(task.done() for task in running + waiting)
        async with asyncio.timeout(WAIT_S):
            await engine.update_weights(offer(2))
            await engine.resume()
            kept, aborted = await asyncio.gather(*running)
            stale, fresh = await asyncio.gather(*waiting)
    assert (kept.finish_reason, kept.num_tokens) == ("length", 85)
    assert aborted.finish_reason == "abort" and 0 < aborted.num_tokens < 85
    assert set(aborted.policy_versions.tolist()) <= {0, 1}
    assert (stale.finish_reason, stale.num_tokens) == ("abort", 0)
    assert fresh.finish_reason == "length" and fresh.num_tokens == 3


async def event_loop_is_not_blocked_by_the_engine(start: StartEngine) -> None:
    async with start() as engine:
        [task] = start_all(engine, [request(80)])
        num_iterations = 0
        async with asyncio.timeout(WAIT_S):
            while not task.done():
                num_iterations += 1
                await asyncio.sleep(0)
    assert num_iterations > 80


async def closing_fails_running_requests(start: StartEngine) -> None:
    async with start() as engine:
        [task] = start_all(engine, [request(90)])
        await until(engine, lambda: engine.stats.num_running == 1)
    with pytest.raises(SpeedAsyncError, match="closed"):
        await gather([task])
    with pytest.raises(SpeedAsyncError, match="closed"):
        await engine.generate(request(3))


async def a_request_with_a_seed_is_reproducible(start: StartEngine) -> None:
    seeded = replace(request(12), seed=2**62 + 1)
    other = replace(seeded, seed=7)
    async with start() as engine:
        [alone] = await gather(start_all(engine, [seeded]))
        [*_, among, different] = await gather(
            start_all(engine, [request(12), request(3), seeded, other])
        )
    assert alone.token_ids.tolist() == among.token_ids.tolist()
    assert alone.token_ids.tolist() != different.token_ids.tolist()


async def temperature_zero_is_greedy(start: StartEngine) -> None:
    greedy = replace(request(12), temperature=0.0)
    async with start() as engine:
        results = await gather(
            start_all(engine, [greedy, request(12), replace(greedy, seed=1), request(12)])
        )
        with pytest.raises(ConfigError, match="temperature"):
            await engine.generate(replace(greedy, temperature=-0.5))
    first, sampled, second, _ = (each.token_ids.tolist() for each in results)
    assert first == second != sampled
    assert np.isfinite(results[0].logprobs).all() and (results[0].logprobs < 0).all()


CONTRACT: list[Callable[[StartEngine], Awaitable[None]]] = [
    completion_has_requested_length_and_versions,
    more_requests_than_slots_all_complete,
    requests_are_served_by_priority_then_fifo,
    max_new_tokens_is_limited_by_context_length,
    invalid_requests_raise_immediately,
    out_of_vocabulary_token_id_fails_only_its_request,
    token_counts_are_always_consistent,
    cancellation_frees_the_slot,
    cancelled_waiting_request_never_runs,
    pause_with_abort_returns_partial_completions,
    no_token_is_sampled_while_paused,
    update_in_flight_changes_the_version_once,
    update_aborts_stale_requests,
    event_loop_is_not_blocked_by_the_engine,
    closing_fails_running_requests,
    a_request_with_a_seed_is_reproducible,
    temperature_zero_is_greedy,
]
