"""The torch engine: the engine contract, exact log-probabilities, updates, canary."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from speed_async.actors.stepped_engine.engine import SteppedEngine
from speed_async.actors.stepped_engine.worker import ThreadWorker
from speed_async.actors.torch_engine import slot_model
from speed_async.actors.torch_engine.generator import TorchGenerator
from speed_async.actors.torch_engine.llama_decoder import LlamaDecoder
from speed_async.actors.torch_engine.sampling import keep_nucleus, sample
from speed_async.actors.torch_engine.slot_cache import SlotCache
from speed_async.errors import SpeedAsyncError, WeightSyncError
from speed_async.learner.canary_probe import CanaryProbe
from speed_async.learner.policy import Policy
from speed_async.types import Sampled, WeightOffer
from speed_async.weight_sync.canary_check import Canary
from speed_async.weight_sync.channel import LoadTensors, NamedTensor, TransferReport
from speed_async.weight_sync.digests import tensor_digests
from tests.fakes.engine_contract import CONTRACT, gather, offer, request, start_all, until
from tests.fakes.forced_logprobs import forced_logprobs, logprobs_with_old_cache, mixed_requests
from tests.fakes.tiny_models import (
    CONTEXT_LENGTH,
    EOS_TOKEN_ID,
    FAMILIES,
    VOCABULARY,
    tiny_model,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class MemoryReceiver:
    """Delivers a model's parameters, in buckets of two tensors, with an optional canary."""

    def __init__(
        self, source: Any, *, stop_after: int | None = None, canary: Canary | None = None
    ) -> None:
        self.tensors = dict(source.named_parameters())
        self.stop_after = stop_after
        self.canary = canary
        self.expected_names: list[str] = []

    def receive(
        self, offer: WeightOffer, expected: Sequence[NamedTensor], load: LoadTensors
    ) -> TransferReport:
        self.expected_names = [name for name, _ in expected]
        pairs = [
            (name, self.tensors[name].detach().to(each.dtype, copy=True)) for name, each in expected
        ]
        for start in range(0, len(pairs), 2):
            if self.stop_after is not None and start >= self.stop_after:
                raise WeightSyncError("the sender disconnected")
            load(pairs[start : start + 2])
        return TransferReport(
            num_bytes=1,
            num_buckets=1,
            transfer_s=0.0,
            canary=self.canary,
            digests=tensor_digests(pairs),
        )

    def close(self) -> None: ...


def generator(model: Any, *, num_slots: int = 2, eos: Sequence[int] = (), **kwargs: Any):
    return TorchGenerator(
        model,
        num_slots=num_slots,
        context_length=CONTEXT_LENGTH,
        eos_token_ids=eos,
        random=torch.Generator().manual_seed(0),
        **kwargs,
    )


def start() -> SteppedEngine:
    model = tiny_model("llama", tied=True)
    return SteppedEngine(ThreadWorker(lambda: generator(model, receiver=MemoryReceiver(model))))


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_torch_engine_satisfies_the_contract(check) -> None:
    asyncio.run(check(start))


def run_until_idle(core: TorchGenerator) -> dict[int, Sampled]:
    finished: dict[int, Sampled] = {}
    while core.has_work:
        finished.update({each.key: each.sampled for each in core.step()})
    return finished


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
@pytest.mark.parametrize("num_slots", [3, 40])
def test_logprobs_match_plain_forward_pass(family: str, tied: bool, num_slots: int) -> None:
    core = generator(tiny_model(family, tied=tied), num_slots=num_slots)
    requests = mixed_requests(60) + mixed_requests(8, seed=1, temperature=0.7, top_p=0.8)
    for key, one in enumerate(requests):
        core.submit(key, one)
    finished = run_until_idle(core)
    plain = tiny_model(family, tied=tied)
    for key, one in enumerate(requests):
        assert finished[key].num_tokens == one.max_new_tokens
        expected = forced_logprobs(plain, one, finished[key])
        np.testing.assert_allclose(finished[key].logprobs, expected, atol=1e-4, rtol=0)


def test_eager_attention_matches_plain_forward_pass() -> None:
    core = generator(tiny_model("llama", tied=True, attention="eager"), num_slots=20)
    requests = mixed_requests(24)
    for key, one in enumerate(requests):
        core.submit(key, one)
    finished = run_until_idle(core)
    plain = tiny_model("llama", tied=True)
    for key, one in enumerate(requests):
        expected = forced_logprobs(plain, one, finished[key])
        np.testing.assert_allclose(finished[key].logprobs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_update_in_flight_switches_logprobs_to_new_weights(family: str, tied: bool) -> None:
    old, new = tiny_model(family, tied=tied), tiny_model(family, tied=tied, seed=1)
    receiver = MemoryReceiver(new)
    core = generator(tiny_model(family, tied=tied), num_slots=6, receiver=receiver)
    requests = mixed_requests(24)
    for key, one in enumerate(requests):
        core.submit(key, one)
    finished = {each.key: each.sampled for _ in range(30) for each in core.step()}
    core.load_weights(offer(5))
    finished.update(run_until_idle(core))
    assert ("lm_head.weight" in receiver.expected_names) is not tied
    num_split = 0
    for key, one in enumerate(requests):
        sampled = finished[key]
        is_new = sampled.policy_versions == 5
        num_split += 0 < is_new.sum() < len(is_new)
        by_old = forced_logprobs(old, one, sampled).numpy()
        by_new = forced_logprobs(new, one, sampled).numpy()
        np.testing.assert_allclose(
            sampled.logprobs, np.where(is_new, by_new, by_old), atol=1e-4, rtol=0
        )
        assert np.abs(by_new - by_old).max() > 1e-2, "the two models must differ"
    assert num_split >= 4


def test_sequences_continue_with_old_cache_without_recompute() -> None:
    old, new = tiny_model("llama", tied=True), tiny_model("llama", tied=True, seed=1)
    core = generator(
        tiny_model("llama", tied=True),
        num_slots=6,
        receiver=MemoryReceiver(new),
        recompute_at_update=False,
    )
    requests = mixed_requests(6)
    for key, one in enumerate(requests):
        core.submit(key, one)
    finished = {each.key: each.sampled for _ in range(6) for each in core.step()}
    core.load_weights(offer(5))
    # Duplicates of all running requests must not copy a prompt cached under the old version.
    requests += requests
    for key, one in enumerate(requests[6:], start=6):
        core.submit(key, one)
    finished.update(run_until_idle(core))
    num_split = 0
    for key, one in enumerate(requests):
        versions = finished[key].policy_versions
        split = 0 < (versions == 5).sum() < len(versions)
        num_split += split
        expected = (
            logprobs_with_old_cache(old, new, one, finished[key], 5)
            if split
            else forced_logprobs(new if versions[0] == 5 else old, one, finished[key])
        )
        np.testing.assert_allclose(finished[key].logprobs, expected, atol=1e-4, rtol=0)
    assert num_split >= 4


def test_update_recomputes_rows_of_all_blocks_in_one_pass(monkeypatch) -> None:
    monkeypatch.setitem(slot_model.PREFILL_TOKENS, "cpu", 16384)
    model = tiny_model("llama", tied=True)
    core = generator(model, num_slots=40, receiver=MemoryReceiver(model))
    for key, one in enumerate(mixed_requests(40)):
        core.submit(key, one)
    core.step()
    assert core.stats().num_running > 2 * 16, "a block has 16 rows"
    passes = prefill_passes(monkeypatch)
    core.load_weights(offer(1))
    assert len(passes) == 1


def prefill_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every prefill pass from now on."""
    passes: list[int] = []
    prefill = LlamaDecoder.prefill

    def counted(self: LlamaDecoder, tokens_UP: torch.Tensor, *, cache: SlotCache) -> None:
        passes.append(len(tokens_UP))
        prefill(self, tokens_UP, cache=cache)

    monkeypatch.setattr(LlamaDecoder, "prefill", counted)
    return passes


def test_equal_prompts_share_one_prefill(monkeypatch) -> None:
    core = generator(tiny_model("llama", tied=True), num_slots=4)
    passes = prefill_passes(monkeypatch)
    one = mixed_requests(1)[0]
    for key in range(3):
        core.submit(key, one)
    core.step()
    assert passes == [1], "one prefill for three equal prompts"
    core.submit(3, one)
    finished = run_until_idle(core)
    assert passes == [1], "no prefill for the fourth request"
    plain = tiny_model("llama", tied=True)
    for sampled in finished.values():
        expected = forced_logprobs(plain, one, sampled)
        np.testing.assert_allclose(sampled.logprobs, expected, atol=1e-4, rtol=0)


def test_completion_ends_with_its_eos_token() -> None:
    core = generator(tiny_model("llama", tied=True), num_slots=16, eos=[EOS_TOKEN_ID, 7])
    for key in range(60):
        core.submit(key, request(60))
    finished = run_until_idle(core)
    stopped = [sampled for sampled in finished.values() if sampled.finish_reason == "stop"]
    assert len(stopped) > 10
    for sampled in finished.values():
        ends = np.flatnonzero(np.isin(sampled.token_ids, [EOS_TOKEN_ID, 7])).tolist()
        last = sampled.num_tokens - 1
        assert ends == ([last] if sampled.finish_reason == "stop" else [])


def test_equal_seeds_sample_equal_tokens() -> None:
    runs = []
    for _ in range(2):
        core = generator(tiny_model("qwen3", tied=True), num_slots=5)
        for key, one in enumerate(mixed_requests(12)):
            core.submit(key, one)
        runs.append([s.token_ids.tolist() for _, s in sorted(run_until_idle(core).items())])
    assert runs[0] == runs[1]


def test_samples_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1])
    count = 40_000
    tokens, logprobs = sample(
        (probs.log() * 2).expand(count, -1),
        temperature_N=torch.full((count,), 2.0),
        top_p_N=None,
        random=torch.Generator().manual_seed(1),
    )
    shares = torch.bincount(tokens, minlength=4) / count
    # Four standard deviations of a share are at most 4 * 0.5 / 200 = 0.01.
    assert (shares - probs).abs().max() < 0.01
    assert torch.allclose(logprobs, probs.log()[tokens], atol=1e-6)


def test_keep_nucleus_matches_hand_computed_values() -> None:
    logprobs = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(4, -1)
    kept = keep_nucleus(logprobs, torch.tensor([0.5, 0.7, 0.76, 1.0])).exp()
    expected = [
        [0, 1, 0, 0],
        [0, 2 / 3, 0, 1 / 3],
        [0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9],
        [0.1, 0.5, 0.15, 0.25],
    ]
    assert torch.allclose(kept, torch.tensor(expected), atol=1e-6)


def test_non_finite_logits_raise() -> None:
    model = tiny_model("llama", tied=True)
    core = generator(model, num_slots=2)
    core.submit(0, request(30))
    core.step()
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    with pytest.raises(SpeedAsyncError, match=r"policy version 0 .* non-finite logits for 1 of 1"):
        core.step()


def test_interrupted_update_ends_the_engine() -> None:
    async def run() -> None:
        model = tiny_model("llama", tied=True)
        receiver = MemoryReceiver(model, stop_after=2)
        async with SteppedEngine(
            ThreadWorker(lambda: generator(model, receiver=receiver))
        ) as engine:
            [task] = start_all(engine, [request(90)])
            await until(engine, lambda: engine.stats.num_running == 1)
            with pytest.raises(WeightSyncError, match="disconnected"):
                await engine.update_weights(offer(1))
            with pytest.raises(WeightSyncError, match="disconnected"):
                await gather([task])
            with pytest.raises(WeightSyncError, match="disconnected"):
                await engine.generate(request(3))

    asyncio.run(run())


def test_update_that_fails_before_the_first_bucket_keeps_the_old_version() -> None:
    async def run() -> None:
        model = tiny_model("llama", tied=True)
        receiver = MemoryReceiver(model, stop_after=0)
        async with SteppedEngine(
            ThreadWorker(lambda: generator(model, receiver=receiver))
        ) as engine:
            [task] = start_all(engine, [request(40)])
            with pytest.raises(WeightSyncError, match="disconnected"):
                await engine.update_weights(offer(1))
            [sampled] = await gather([task])
            assert set(sampled.policy_versions.tolist()) == {0}

    asyncio.run(run())


# --- the canary ---------------------------------------------------------------------------------


def canary_of(model: Any) -> Canary:
    """The canary that the learner measures; independent of the policy's temperature."""
    return CanaryProbe(model).measure(Policy(model, temperature=0.7))


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_version_with_matching_canary_is_accepted(family: str, tied: bool, attention: str) -> None:
    new = tiny_model(family, tied=tied, seed=1)
    core = generator(
        tiny_model(family, tied=tied, attention=attention),
        num_slots=6,
        receiver=MemoryReceiver(new, canary=canary_of(new)),
    )
    requests = mixed_requests(12)
    for key, one in enumerate(requests):
        core.submit(key, one)
    finished = {each.key: each.sampled for _ in range(10) for each in core.step()}
    core.load_weights(offer(5))
    assert core.has_valid_weights
    finished.update(run_until_idle(core))
    num_new = 0
    for key, one in enumerate(requests):
        is_new = finished[key].policy_versions == 5
        num_new += is_new.sum()
        by_new = forced_logprobs(new, one, finished[key]).numpy()
        np.testing.assert_allclose(finished[key].logprobs[is_new], by_new[is_new], atol=1e-4)
    assert num_new > 100


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_any_single_wrong_tensor_is_rejected(family: str, tied: bool) -> None:
    """Each tensor in turn arrives with its rows in reverse order (norms: 10 % too large)."""
    new = tiny_model(family, tied=tied, seed=1)
    canary = canary_of(new)
    names = [name for name, _ in new.named_parameters()]
    assert len(names) > 15
    for name in names:
        receiver = MemoryReceiver(new, canary=canary)
        correct = receiver.tensors[name]
        receiver.tensors[name] = correct.flip(0) if correct.dim() > 1 else correct * 1.1
        core = generator(tiny_model(family, tied=tied), receiver=receiver)
        with pytest.raises(WeightSyncError, match="version 5 is refused, its canary failed"):
            core.load_weights(offer(5))
        assert not core.has_valid_weights, name
        assert core.stats().policy_version == 0


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_stale_packed_copy_of_a_tied_head_is_rejected(family: str) -> None:
    """Every tensor arrives unchanged, but the engine computes with an old copy."""
    new, model = tiny_model(family, tied=True, seed=1), tiny_model(family, tied=True)
    packed = model.lm_head.weight.detach().clone()
    model.lm_head.forward = lambda hidden: torch.nn.functional.linear(hidden, packed)
    core = generator(model, receiver=MemoryReceiver(new, canary=canary_of(new)))
    with pytest.raises(
        WeightSyncError, match=r"by [1-9][\d.]* nats a token .* tied or packed copy"
    ):
        core.load_weights(offer(5))
    for name, tensor in new.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], tensor), name


def test_canary_tolerance_allows_half_precision_rounding_and_is_configurable() -> None:
    new = tiny_model("llama", tied=True, seed=1)
    canary = canary_of(new)

    def load(canary_tolerance: float | None) -> TorchGenerator:
        model = tiny_model("llama", tied=True).to(torch.bfloat16)
        receiver = MemoryReceiver(new, canary=canary)
        core = generator(model, receiver=receiver, canary_tolerance=canary_tolerance)
        core.load_weights(offer(1))
        return core

    assert load(None).stats().policy_version == 1
    with pytest.raises(WeightSyncError, match=r"more than the tolerance of 0\.001"):
        load(1e-3)


def test_canary_with_out_of_vocabulary_token_ids_is_rejected() -> None:
    model = tiny_model("llama", tied=True)
    size = len(VOCABULARY)
    canary = Canary(token_ids=(1, size), logprobs=(-1.0,))
    core = generator(model, receiver=MemoryReceiver(model, canary=canary))
    with pytest.raises(WeightSyncError, match=f"token id {size} and this model {size} ids"):
        core.load_weights(offer(1))
    assert not core.has_valid_weights


def test_engine_never_samples_after_a_rejected_version() -> None:
    async def run() -> None:
        new = tiny_model("llama", tied=True, seed=1)
        wrong_canary = canary_of(tiny_model("llama", tied=True, seed=2))
        receiver = MemoryReceiver(new, canary=wrong_canary)
        worker = ThreadWorker(lambda: generator(tiny_model("llama", tied=True), receiver=receiver))
        async with SteppedEngine(worker) as engine:
            tasks = start_all(engine, [request(90), request(90), request(90)])
            await until(engine, lambda: engine.stats.num_running == 2)
            with pytest.raises(WeightSyncError, match="canary"):
                await engine.update_weights(offer(1))
            num_tokens = engine.stats.tokens_generated
            for task in tasks:
                with pytest.raises(WeightSyncError, match="canary"):
                    await gather([task])
            for call in (
                engine.generate(request(3)),
                engine.resume(),
                engine.pause(abort=False),
                engine.update_weights(offer(2)),
            ):
                with pytest.raises(WeightSyncError, match="policy version 1 is refused"):
                    await call
            assert engine.stats.policy_version == 0
            assert engine.stats.tokens_generated == num_tokens

    asyncio.run(run())
