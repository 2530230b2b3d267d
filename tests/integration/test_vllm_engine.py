"""The vLLM engine on the CPU: the engine contract, and mu against a plain forward pass."""

import asyncio
import copy
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from speed_async.actors.stepped_engine.engine import SteppedEngine
from speed_async.actors.stepped_engine.worker import ThreadWorker
from speed_async.actors.torch_engine.generator import TorchGenerator
from speed_async.actors.vllm_engine import options
from speed_async.errors import IncarnationLost, SpeedAsyncError, WeightSyncError
from speed_async.evaluation.statistics import paired_bootstrap
from speed_async.weight_sync import broadcast
from speed_async.weight_sync.digests import tensor_digests
from tests.fakes.engine_contract import CONTRACT, gather, offer, request, start_all, until
from tests.fakes.forced_logprobs import forced_logprobs, logprobs_with_old_cache, mixed_requests
from tests.fakes.open_sockets import children_of, descendants, is_loopback, listening
from tests.fakes.vllm_setup import (
    CONTEXT_LENGTH,
    NEEDS_VLLM,
    canary_of,
    vllm_config,
    vllm_environment,
    vllm_model,
)

if TYPE_CHECKING:
    from tests.fakes.vllm_harness import VllmHarness

pytestmark = [*NEEDS_VLLM, pytest.mark.xdist_group("vllm engine")]

EXTENSION = "tests.fakes.vllm_faults.FaultyWorker"
TIED, UNTIED_OF_TWO_WORKERS = (True, 1), (False, 2)


@pytest.fixture(
    scope="module", params=[TIED, UNTIED_OF_TWO_WORKERS], ids=["tied", "untied-tensor-parallel"]
)
def shared_harness(
    request: Any, tmp_path_factory: pytest.TempPathFactory
) -> "Iterator[VllmHarness]":
    from tests.fakes.vllm_harness import VllmHarness

    tied, num_workers = request.param
    folder = tmp_path_factory.mktemp("vllm")
    config = vllm_config(folder, tied=tied, tensor_parallel=num_workers)
    with vllm_environment(config), pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "WORKER_EXTENSION", EXTENSION)
        started = VllmHarness(config, tied=tied)
        yield started
        started.close()


@pytest.fixture
def harness(shared_harness: "VllmHarness") -> "VllmHarness":
    """The shared harness with its initial weights."""
    shared_harness.weights = lambda version: vllm_model(tied=shared_harness.tied)
    shared_harness.canary = lambda version: canary_of(shared_harness.weights(version))
    canary_of(vllm_model(tied=shared_harness.tied, seed=1))
    shared_harness.errors.clear()
    return shared_harness


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_vllm_engine_satisfies_the_contract(harness: "VllmHarness", check: Any) -> None:
    harness.run(check(harness.start))


def test_both_engines_agree_on_the_same_weights(harness: "VllmHarness") -> None:
    """Exactly at temperature 0; within the interval of an evaluation at temperature 1."""
    if not harness.tied:
        pytest.skip("one set of weights is enough")
    model = vllm_model(tied=harness.tied)
    greedy = [replace(each, temperature=0.0, max_new_tokens=16) for each in mixed_requests(6)]
    sampled = [
        replace(greedy[i], temperature=1.0, max_new_tokens=2, seed=i * 8 + j)
        for i in range(6)
        for j in range(8)
    ]

    def stepped() -> SteppedEngine:
        random = torch.Generator().manual_seed(0)
        return SteppedEngine(
            ThreadWorker(
                lambda: TorchGenerator(
                    model,
                    num_slots=16,
                    context_length=CONTEXT_LENGTH,
                    eos_token_ids=(),
                    random=random,
                )
            )
        )

    async def generate(engine: Any) -> list[list[int]]:
        async with engine:
            results = await gather(start_all(engine, greedy + sampled))
        return [each.token_ids.tolist() for each in results]

    of_vllm = harness.run(generate(harness.start()))
    of_torch = asyncio.run(generate(stepped()))
    assert of_vllm[: len(greedy)] == of_torch[: len(greedy)]
    # What passes: a sum of token ids that is even.
    rates = [
        np.array([sum(tokens) % 2 == 0 for tokens in each[len(greedy) :]]).reshape(6, 8).mean(1)
        for each in (of_vllm, of_torch)
    ]
    difference = paired_bootstrap(rates[0] - rates[1], confidence=0.999)
    assert difference.low <= 0 <= difference.high


def is_split(sampled: Any) -> bool:
    """Whether two policy versions sampled tokens of this completion."""
    return len(set(sampled.policy_versions.tolist())) == 2


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
def test_mu_matches_forward_pass_before_and_after_an_update(
    harness: "VllmHarness", recompute: bool
) -> None:
    old, new = vllm_model(tied=harness.tied), vllm_model(tied=harness.tied, seed=1)
    requests = mixed_requests(12) + mixed_requests(4, seed=1, temperature=0.7, top_p=0.8)
    harness.weights = lambda version: new if version == 5 else old

    async def run() -> list[Any]:
        async with harness.start(recompute_at_update=recompute) as engine:
            tasks = start_all(engine, requests)
            num_tokens = sum(each.max_new_tokens for each in requests) // 3
            await until(engine, lambda: engine.stats.tokens_generated >= num_tokens)
            addresses = set().union(*map(listening, descendants(os.getpid())))
            assert addresses  # includes the store of a tensor-parallel worker
            assert all(map(is_loopback, addresses))
            await engine.update_weights(offer(5))
            sampled = await gather(tasks)
            await engine.update_weights(offer(6))  # restores the old weights for the next test
        return sampled

    results: list[Any] = []
    for _ in range(20):  # on a busy machine, all may be finished before the update
        results = harness.run(run())
        if any(map(is_split, results)):
            break
    assert harness.errors == []
    assert any(map(is_split, results))
    for one, sampled in zip(requests, results, strict=True):
        assert sampled.num_tokens == one.max_new_tokens
        is_new = sampled.policy_versions == 5
        by_old = forced_logprobs(old, one, sampled).numpy()
        by_new = forced_logprobs(new, one, sampled).numpy()
        if is_split(sampled) and not recompute:
            by_new = logprobs_with_old_cache(old, new, one, sampled, 5).numpy()
        expected = np.where(is_new, by_new, by_old)
        np.testing.assert_allclose(sampled.logprobs, expected, atol=1e-3, rtol=0)


def test_completion_ends_with_its_eos_token(harness: "VllmHarness") -> None:
    eos = (2, 7)

    async def run() -> list[Any]:
        async with harness.start(eos_token_ids=eos) as engine:
            return await gather(start_all(engine, [request(60) for _ in range(30)]))

    results = harness.run(run())
    assert sum(sampled.finish_reason == "stop" for sampled in results) > 5
    for sampled in results:
        ends = np.flatnonzero(np.isin(sampled.token_ids, eos)).tolist()
        last = sampled.num_tokens - 1
        assert ends == ([last] if sampled.finish_reason == "stop" else [])


def test_failed_canary_rejects_the_version_and_its_completions(
    harness: "VllmHarness",
) -> None:
    harness.canary = lambda version: canary_of(vllm_model(tied=harness.tied, seed=2))

    async def run() -> None:
        async with harness.start() as engine:
            tasks = start_all(engine, [request(3) for _ in range(20)])
            await until(engine, lambda: engine.stats.tokens_generated >= 3)
            with pytest.raises(WeightSyncError, match="version 5 is refused, its canary failed"):
                await engine.update_weights(offer(5))
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    assert "canary failed" in str(outcome)
                else:
                    assert set(outcome.policy_versions.tolist()) == {0}
            with pytest.raises(WeightSyncError, match="canary failed"):
                await engine.generate(request(3))

    harness.run(run())


def test_failed_digest_rejects_the_version_before_the_canary(
    harness: "VllmHarness", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender's digest of one tensor belongs to another value than the one that arrives."""

    def of_other_norm(tensors: Any) -> dict[str, int]:
        return tensor_digests(tensors) | tensor_digests([("model.norm.weight", torch.zeros(32))])

    monkeypatch.setattr(broadcast, "tensor_digests", of_other_norm)

    async def run() -> None:
        async with harness.start() as engine:
            [task] = start_all(engine, [request(90)])
            await until(engine, lambda: engine.stats.tokens_running >= 3)
            message = r"version 5 is refused, its digest failed: 1 of \d+ .* 'model\.norm\.weight'"
            with pytest.raises(WeightSyncError, match=message):
                await engine.update_weights(offer(5))
            with pytest.raises(WeightSyncError, match="digest failed"):
                await gather([task])

    harness.run(run())
    assert harness.errors == []


DIFFER = r"tensors differ in what vLLM holds, first"
HELD_FAULTS = {
    "one_ulp": rf"1 of \d+ {DIFFER} 'model\.norm\.weight'",
    "stale": rf"1 of \d+ {DIFFER} 'model\.layers\.0\.self_attn\.k_proj\.weight'",
    "transposed": rf"1 of \d+ {DIFFER} 'model\.layers\.0\.self_attn\.o_proj\.weight'",
    "swapped": rf"2 of \d+ {DIFFER} 'model\.layers\.1\.mlp\.gate_proj\.weight'",
}
FAULTS_OF_TIED = {
    "old_packed_head": rf"1 of \d+ {DIFFER} 'model\.embed_tokens\.weight'",
    "untied_head": rf"1 of \d+ {DIFFER} 'lm_head\.weight'",
}
FAULTS_OF_TWO_WORKERS = {
    "wrong_shard": (
        r"1 of \d+ tensors were loaded in part, first 'model\.layers\.1\.mlp\.down_proj\.weight'"
    ),
}


@pytest.mark.parametrize("fault", [*HELD_FAULTS, *FAULTS_OF_TIED, *FAULTS_OF_TWO_WORKERS])
def test_a_fault_in_what_the_last_worker_holds_is_refused(
    harness: "VllmHarness", fault: str
) -> None:
    faults = HELD_FAULTS | (FAULTS_OF_TIED if harness.tied else FAULTS_OF_TWO_WORKERS)
    if fault not in faults:
        pytest.skip("a fault of the other model")
    harness.weights = lambda version: vllm_model(tied=harness.tied, seed=version)
    harness.canary = lambda version: canary_of(vllm_model(tied=harness.tied, seed=version))

    async def run() -> None:
        async with harness.start() as engine:
            await engine.update_weights(offer(1))
            await harness.llm.collective_rpc("make_fault", args=(fault, int(not harness.tied)))
            message = f"version 2 is refused, its digest failed: {faults[fault]}"
            try:
                with pytest.raises(WeightSyncError, match=message):
                    await engine.update_weights(offer(2))
            finally:
                await harness.llm.collective_rpc("end_fault")
        async with harness.start() as engine:
            await engine.update_weights(offer(3))

    harness.run(run())
    assert harness.errors == []


def test_manifest_mismatch_is_rejected_and_keeps_the_old_version(
    harness: "VllmHarness",
) -> None:
    wrong = copy.deepcopy(vllm_model(tied=harness.tied))
    wrong.model.norm.weight = torch.nn.Parameter(torch.ones(7))
    harness.weights = lambda version: wrong if version == 5 else vllm_model(tied=harness.tied)
    harness.canary = lambda version: canary_of(vllm_model(tied=harness.tied))

    async def run() -> None:
        async with harness.start() as engine:
            [task] = start_all(engine, [request(40)])
            await until(engine, lambda: engine.stats.tokens_running >= 3)
            with pytest.raises(WeightSyncError, match=r"model.norm.weight is float32\[7\]"):
                await engine.update_weights(offer(5))
            [sampled] = await gather([task])
            assert set(sampled.policy_versions.tolist()) == {0}
            harness.epoch += 1
            report = await engine.update_weights(offer(6))
            assert report.policy_version == 6

    harness.run(run())
    assert "rank 1 refused" in str(harness.errors[0])


def test_killed_vllm_raises_given_up(shared_harness: "VllmHarness") -> None:
    """The last test of each vLLM. That another one starts in the same process is shown by the
    tests of the next one."""
    harness = shared_harness

    async def run() -> None:
        async with harness.start() as engine:
            tasks = start_all(engine, [request(90) for _ in range(200)])
            await until(engine, lambda: engine.stats.num_running == 2)
            [core] = [pid for pid in children_of(os.getpid()) if name_of(pid) == "VLLM::EngineCor"]
            os.kill(core, signal.SIGKILL)
            with pytest.raises(IncarnationLost, match="died"):
                await gather(tasks[-1:])
            with pytest.raises(IncarnationLost, match="died"):
                await engine.generate(request(3))

    harness.run(run())


def test_one_wrong_expert_is_refused(tmp_path: Path) -> None:
    """Experts of a CPU are packed again after each update, and compared before."""
    from tests.fakes.vllm_harness import VllmHarness

    config = vllm_config(tmp_path, tied=True, family="qwen3_moe")
    with vllm_environment(config), pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "WORKER_EXTENSION", EXTENSION)
        harness = VllmHarness(config, tied=True)
        harness.weights = lambda version: vllm_model(tied=True, family="qwen3_moe", seed=version)

        async def run() -> None:
            async with harness.start() as engine:
                await engine.update_weights(offer(1))  # accepted by digest and canary
                await harness.llm.collective_rpc("make_fault", args=("expert", 0))
                name = r"model\.layers\.1\.mlp\.experts\.down_proj"
                with pytest.raises(WeightSyncError, match=rf"1 of \d+ {DIFFER} '{name}'"):
                    await engine.update_weights(offer(2))

        try:
            harness.run(run())
        finally:
            harness.close()


def with_unknown_architecture(model: Path) -> None:
    path = model / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "LlamaForNothing"))


def with_weights_of_an_optimizer(model: Path) -> None:
    """Without an index, vLLM reads every *.safetensors. The error is only in the worker's log."""
    (model / "model.safetensors.index.json").unlink()
    save_file({"lm_head.weight.exp_avg": torch.zeros(1)}, model / "optimizer.safetensors")


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (with_unknown_architecture, "Model architectures ['LlamaForNothing'] are not supported"),
        (
            with_weights_of_an_optimizer,
            "ValueError: Attempted to load nested weight 'lm_head.weight.exp_avg'",
        ),
    ],
)
def test_start_error_names_its_cause(
    tmp_path: Path, damage: Callable[[Path], None], cause: str
) -> None:
    from speed_async.actors.vllm_engine.start import start_llm

    config = vllm_config(tmp_path, tied=False)
    damage(Path(config.model.path))
    with (
        vllm_environment(config),
        pytest.raises(SpeedAsyncError, match=r"^vLLM did not start: ") as raised,
    ):
        start_llm(config, seed=0)
    error = str(raised.value)
    assert cause in error
    assert "See root cause" not in error
    assert len(error) < 600


def name_of(process_id: int) -> str:
    return Path(f"/proc/{process_id}/comm").read_text().strip()
