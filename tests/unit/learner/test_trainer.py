from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GraniteConfig,
    MistralConfig,
    PreTrainedConfig,
)

from speed_async.algorithms.loss_tokens import Corrected, LossTokens, TokenLosses
from speed_async.algorithms.objective import make_objective
from speed_async.config.sections.gate import GateConfig
from speed_async.config.sections.learner import ActivationCheckpointing
from speed_async.config.sections.objective import POLICY_LOSSES, ObjectiveConfig
from speed_async.errors import ModelError
from speed_async.learner.canary_probe import CanaryProbe
from speed_async.learner.model import compile_layers, load_model
from speed_async.learner.optimizer_update import MIN_WEIGHT_MEAN
from speed_async.learner.policy import Policy, check_policy
from speed_async.learner.trainer import Trainer
from speed_async.types import Group
from tests.fakes.learner_samples import (
    VOCABULARY,
    make_completion,
    make_config,
    make_group,
    random_groups,
    save_tiny_llama,
)
from tests.fakes.live_bytes import LiveBytes

UNLIMITED = 1e9
CHECKPOINTING: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")


def make_trainer(folder: Path, *, seed: int = 0, **settings: Any):
    """`settings` are those of `make_config`."""
    save_tiny_llama(folder, seed=seed)
    config = make_config(folder, **settings)
    return Trainer(config=config, model=load_model(folder, device="cpu"))


def parameters(trainer: Trainer) -> list[torch.Tensor]:
    return [tensor.clone() for _, tensor in trainer.weights()]


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    return [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


def dense_loss(
    model: torch.nn.Module, groups: Sequence[Group], *, temperature: float, cap: float
) -> torch.Tensor:
    """Direct implementation of the definition, with loops over sequences and tokens."""
    loss, num_tokens = torch.zeros(()), 0
    for group in groups:
        rewards = [completion.reward for completion in group.completions]
        for i, completion in enumerate(group.completions):
            others = rewards[:i] + rewards[i + 1 :]
            advantage = rewards[i] - sum(others) / len(others)
            token_ids = completion.sampled.token_ids.tolist()
            prompt = group.prompt_token_ids.tolist()
            logits_LV = model(input_ids=torch.tensor([prompt + token_ids])).logits[0]
            for t, token in enumerate(token_ids):
                logprob = (logits_LV[len(prompt) + t - 1] / temperature).log_softmax(-1)[token]
                ratio = (logprob.detach() - float(completion.sampled.logprobs[t])).exp()
                loss = loss - ratio.clamp(max=cap) * advantage * logprob
                num_tokens += 1
    return loss / num_tokens


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("micro_batch_tokens", [16, 8192])
def test_the_gradient_matches_a_dense_implementation(
    tmp_path: Path, seed: int, micro_batch_tokens: int
):
    trainer = make_trainer(
        tmp_path, seed=seed, temperature=0.8, micro_batch_tokens=micro_batch_tokens,
        grad_clip=UNLIMITED,
        objective=ObjectiveConfig(
            policy_loss="policy_gradient", correction="token_tis", max_ratio=1.5
        ),
    )  # fmt: skip
    groups = random_groups(seed)
    flat = make_group([1, 2], make_completion([3], 1.0), make_completion([4, 5], 1.0))
    reference = load_model(tmp_path, device="cpu")
    loss = dense_loss(reference, [*groups, flat], temperature=0.8, cap=1.5)
    loss.backward()

    result = trainer.update([*groups, flat])

    assert result.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert result.metrics["zero_signal_groups"] == 1.0
    expected = [p.grad for p in reference.parameters()]
    for ours, theirs in zip(gradients(trainer), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    norm = torch.stack([g.square().sum() for g in expected if g is not None]).sum().sqrt()
    assert result.metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_metrics_of_an_update(tmp_path: Path):
    trainer = make_trainer(tmp_path, objective=ObjectiveConfig(screening_samples="none"))
    first = make_group(
        [1], *[make_completion([2, 3], 1.0), make_completion([4], 0.0)] * 2, num_screening=1
    )
    second = make_group([1], make_completion([2], 0.5), make_completion([4, 5], 0.25))

    result = trainer.update([first, second])

    assert (result.skipped, result.skip_reason) == (False, "")
    assert (result.tokens, result.completions) == (9, 6)
    assert result.metrics["trained_reward_mean"] == pytest.approx(2.75 / 6)
    assert result.metrics["pass_rate_mean"] == pytest.approx(0.25)
    assert result.metrics["pivotal_share"] == 1.0
    assert result.metrics["skipped_updates"] == 0.0
    assert result.metrics["optimizer_updates"] == 1.0
    histogram = {key for key in result.metrics if key.startswith("pass_rate_histogram/")}
    assert len(histogram) == 12
    assert set(result.metrics) - histogram == {
        "loss", "grad_norm", "lr", "ratio_mean", "ratio_max", "weight_mean", "token_weight_max",
        "clipped_share", "dual_clipped_share", "truncated_share",
        "masked_share", "kl_k1", "kl_k3", "effective_sample_size", "entropy",
        "trained_reward_mean", "pass_rate_mean", "zero_signal_groups", "zero_signal_share",
        "completion_tokens_mean", "empty_completions", "cut_completions", "cut_passed",
            "pivotal_share",
        "skipped_updates", "optimizer_updates",
    }  # fmt: skip


def test_weights_change_only_after_the_call_before_each_step(tmp_path: Path):
    trainer = make_trainer(tmp_path, passes=2, minibatches=2)
    initial, seen = parameters(trainer), []
    trainer.update(random_groups(3, num_groups=4), lambda: seen.append(parameters(trainer)))
    assert len(seen) == 4
    assert all(map(torch.equal, seen[0], initial))
    for before, after in pairwise([*seen, parameters(trainer)]):
        assert not all(map(torch.equal, before, after))


def test_zero_signal_groups_count_in_the_denominator(tmp_path: Path):
    with_signal = make_group([1], make_completion([2, 3], 1.0), make_completion([4, 5], 0.0))
    flat = make_group([1], make_completion([6, 7], 1.0), make_completion([8, 9], 1.0))
    undiluted = make_trainer(tmp_path / "a", grad_clip=UNLIMITED)
    diluted = make_trainer(tmp_path / "b", grad_clip=UNLIMITED)

    undiluted.update([with_signal])
    diluted.update([with_signal, flat])

    for whole, half in zip(gradients(undiluted), gradients(diluted), strict=True):
        torch.testing.assert_close(half, whole / 2)


def test_a_batch_without_signal_steps_with_zero_gradient(tmp_path: Path):
    trainer = make_trainer(tmp_path, lr=0.01, weight_decay=0.5, warmup_updates=0)
    before = parameters(trainer)

    result = trainer.update([make_group([1], make_completion([2], 1.0), make_completion([3], 1.0))])

    assert not result.skipped
    assert result.metrics["loss"] == 0.0
    assert result.metrics["grad_norm"] == 0.0
    assert "ratio_mean" not in result.metrics
    for old, new in zip(before, parameters(trainer), strict=True):
        # Only weight decay changes the parameters, and only those with two dimensions.
        torch.testing.assert_close(new, old * (1 - 0.01 * 0.5) if old.dim() >= 2 else old)


def test_the_learning_rate_warms_up_linearly(tmp_path: Path):
    trainer = make_trainer(tmp_path, lr=0.4e-3, warmup_updates=4)
    rates = [trainer.update(random_groups(i)).metrics["lr"] for i in range(6)]
    assert rates == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4, 4e-4])


def test_a_non_finite_behaviour_log_probability_skips_the_update(tmp_path: Path):
    trainer = make_trainer(tmp_path, lr=0.1)
    before = parameters(trainer)
    non_finite = make_group(
        [1], make_completion([2], 1.0, [float("nan")]), make_completion([3], 0.0)
    )

    result = trainer.update([non_finite])

    assert result.skipped
    assert "behaviour log-probability" in result.skip_reason
    assert result.metrics["skipped_updates"] == 1.0
    assert "loss" not in result.metrics
    for old, new in zip(before, parameters(trainer), strict=True):
        assert torch.equal(old, new)
    later = trainer.update(random_groups(0))
    assert not later.skipped
    assert later.metrics["skipped_updates"] == 1.0


def test_a_non_finite_gradient_leaves_parameters_and_moments_unchanged(tmp_path: Path):
    return_infinity = False

    def sometimes_infinite(tokens: LossTokens, corrected: Corrected) -> TokenLosses:
        scale = float("inf") if return_infinity else 1.0
        return TokenLosses(
            losses_N=tokens.logprobs_N * scale, clipped_N=torch.zeros_like(corrected.masked_N)
        )

    trainers = []
    for name in ("non_finite", "clean"):
        folder = save_tiny_llama(tmp_path / name)
        config = make_config(folder, lr=0.01, warmup_updates=0)
        trainers.append(
            Trainer(
                config=config, model=load_model(folder, device="cpu"),
                objective=replace(make_objective(config), policy_loss=sometimes_infinite),
            )
        )  # fmt: skip
    for trainer in trainers:
        trainer.update(random_groups(0))
    return_infinity = True
    result = trainers[0].update(random_groups(1))
    return_infinity = False
    for trainer in trainers:
        trainer.update(random_groups(2))

    assert result.skipped
    assert result.skip_reason == "not finite: loss and grad_norm"
    assert result.metrics["optimizer_updates"] == 1.0
    assert np.isfinite(list(result.metrics.values())).all()
    for one, other in zip(parameters(trainers[0]), parameters(trainers[1]), strict=True):
        assert torch.equal(one, other)


def logprob(model: torch.nn.Module, prompt: list[int], token_ids: list[int]) -> torch.Tensor:
    """log pi of each token of a completion (T,), with gradient."""
    logits_LV = model(input_ids=torch.tensor([prompt + token_ids])).logits[0]
    logprobs_TV = logits_LV[len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs_TV.gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


def on_policy_groups(folder: Path, seed: int) -> list[Group]:
    """`random_groups` with log mu of the model in `folder`."""
    model, groups = load_model(folder, device="cpu"), []
    for group in random_groups(seed):
        prompt = group.prompt_token_ids.tolist()
        completions = []
        for completion in group.completions:
            token_ids = completion.sampled.token_ids.tolist()
            with torch.no_grad():
                logprobs = logprob(model, prompt, token_ids).tolist()
            completions.append(make_completion(token_ids, completion.reward, logprobs))
        groups.append(make_group(prompt, *completions))
    return groups


@pytest.mark.parametrize(
    ("choice", "coefficients"),
    [
        # rewards 1 0 0 | 1 0, RLOO advantages 3/4 -1/2 -1/2 3/4 -1/2; one pass among three
        # screening samples is pivotal
        ("all", [0.75, -0.5, -0.5, 0.75, -0.5]),
        ("unbiased", [0.0, -0.5, -0.5, 0.75, -0.5]),
        ("none", [0.0, 0.0, 0.0, 0.75, -0.5]),
    ],
)
def test_the_gradient_respects_the_choice_of_screening_samples(
    tmp_path: Path, choice: Any, coefficients: list[float]
):
    trainer = make_trainer(
        tmp_path, grad_clip=UNLIMITED, gate=GateConfig(n_init=3, n_cont=2),
        objective=ObjectiveConfig(screening_samples=choice, policy_loss="policy_gradient"),
    )  # fmt: skip
    sampled = [[2, 3], [4], [5, 6], [7], [8, 9]]
    group = make_group(
        [1], *[make_completion(s, r) for s, r in zip(sampled, [1, 0, 0, 1, 0], strict=True)],
        num_screening=3,
    )  # fmt: skip
    reference = load_model(tmp_path, device="cpu")
    loss = sum(
        -coefficient * logprob(reference, [1], token_ids).sum() / 8  # tokens of the update
        for coefficient, token_ids in zip(coefficients, sampled, strict=True)
        if coefficient
    )
    assert isinstance(loss, torch.Tensor)
    loss.backward()

    result = trainer.update([group])

    assert result.metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert result.metrics["pivotal_share"] == pytest.approx(coefficients[:3].count(0.0) / 3)
    for ours, theirs in zip(gradients(trainer), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, atol=1e-6, rtol=1e-4)


CORRECTIONS = get_args(ObjectiveConfig.model_fields["correction"].annotation)
COMBINATIONS = list(product(POLICY_LOSSES, CORRECTIONS))


def objective_trainer(
    folder: Path, objective: ObjectiveConfig, *, age: int = 0, **learner: Any
) -> Trainer:
    """A trainer of the model in `folder` at version `age`, so that tokens of version 0 have this
    age."""
    config = make_config(folder, objective=objective, **learner)
    trainer = Trainer(config=config, model=load_model(folder, device="cpu"))
    trainer.num_updates = age
    return trainer


@pytest.mark.parametrize(("loss", "correction"), COMBINATIONS)
def test_every_loss_takes_a_finite_step_under_every_correction(
    tmp_path: Path, loss: Any, correction: Any
):
    chosen = ObjectiveConfig(
        policy_loss=loss, correction=correction, min_ratio=0.05, max_ratio=20.0,
        aggregation="sequence_mean",
    )  # fmt: skip
    save_tiny_llama(tmp_path)
    runs = []
    for micro_batch_tokens in (16, 8192):
        trainer = objective_trainer(
            tmp_path, chosen, age=2, lr=1e-3, warmup_updates=0, grad_clip=UNLIMITED,
            micro_batch_tokens=micro_batch_tokens,
        )  # fmt: skip
        before = parameters(trainer)
        result = trainer.update(random_groups(3))
        assert not result.skipped
        assert result.metrics["grad_norm"] > 0
        pairs = zip(before, parameters(trainer), strict=True)
        assert any(not torch.equal(old, new) for old, new in pairs)
        runs.append(gradients(trainer))
    for split, whole in zip(*runs, strict=True):  # no sequence is split
        torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-4)


def test_on_policy_losses_and_corrections_equal_the_policy_gradient(tmp_path: Path):
    save_tiny_llama(tmp_path)
    groups = on_policy_groups(tmp_path, 4)

    def gradient_under(loss: Any, correction: Any) -> list[torch.Tensor]:
        chosen = ObjectiveConfig(policy_loss=loss, correction=correction)
        trainer = objective_trainer(tmp_path, chosen, grad_clip=UNLIMITED)
        trainer.update(groups)
        return gradients(trainer)

    plain = gradient_under("policy_gradient", "none")
    assert max(float(gradient.abs().max()) for gradient in plain) > 1e-2
    for loss, correction in COMBINATIONS:
        for ours, theirs in zip(gradient_under(loss, correction), plain, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def assert_divided_weights(folder: Path, groups: list[Group], divisor: float | None) -> float:
    """Results of `sequence_snis` are those of `sequence_tis`, divided by this number; None: by the
    mean weight, which is returned."""
    save_tiny_llama(folder)
    runs = {}
    for correction in ("sequence_tis", "sequence_snis"):
        chosen = ObjectiveConfig(
            policy_loss="policy_gradient", correction=correction, max_ratio=1.1
        )
        trainer = objective_trainer(folder, chosen, grad_clip=UNLIMITED, micro_batch_tokens=16)
        runs[correction] = trainer.update(groups).metrics, gradients(trainer)

    (plain, plain_gradients), (metrics, normalized) = runs.values()
    mean = plain["weight_mean"]
    assert mean == metrics["weight_mean"]
    for name in ("loss", "grad_norm", "token_weight_max"):
        expected = plain[name] / (divisor or mean)
        assert metrics[name] == pytest.approx(expected, rel=1e-6, abs=0.0)
    for ours, theirs in zip(normalized, plain_gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs / (divisor or mean), rtol=1e-5, atol=0.0)
    return mean


def test_self_normalized_weights_divide_the_gradient_by_the_mean_weight(tmp_path: Path):
    mean = assert_divided_weights(tmp_path, random_groups(3), None)
    assert mean != pytest.approx(1.0, abs=0.1)
    # Completions of equal rewards have no gradient: they are not in the mean.
    flat = make_group([1, 2], *[make_completion([3], 1.0, [-0.1])] * 4, lease_id=9)
    assert assert_divided_weights(tmp_path, [*random_groups(3), flat], None) == mean


def test_the_divisor_of_self_normalized_weights_has_a_floor(tmp_path: Path):
    """Completions of 10 tokens that mu was certain of, and that the policy does not expect."""
    certain = [
        make_completion(
            np.random.default_rng(i).integers(0, VOCABULARY, 10).tolist(), i, [0.0] * 10
        )
        for i in (0, 1)
    ]
    mean = assert_divided_weights(tmp_path, [make_group([1], *certain)], MIN_WEIGHT_MEAN)
    assert 0.0 < mean < 0.1 * MIN_WEIGHT_MEAN


@pytest.mark.parametrize(
    ("max_new_tokens", "model", "max_context"), [(64, 16, None), (1000, 16, None), (1000, 64, 16)]
)
def test_limits_beyond_the_context_have_no_effect(
    tmp_path: Path, max_new_tokens: int, model: int, max_context: int | None
):
    """The divisor of Dr. GRPO and the overlong penalty follow from the model's limit or from the
    configured one. Only they contribute to the gradient."""

    def gradient(max_new_tokens: int, model: int, max_context: int | None) -> list[torch.Tensor]:
        save_tiny_llama(tmp_path, max_position_embeddings=model)
        config = make_config(
            tmp_path,
            max_new_tokens=max_new_tokens,
            objective=ObjectiveConfig(
                advantage="dr_grpo", aggregation="fixed_length", overlong_share=0.5
            ),
        )
        chosen = config.model.model_copy(update={"context_length": max_context})
        trainer = Trainer(
            config=config.model_copy(update={"model": chosen}),
            model=load_model(tmp_path, device="cpu"),
        )
        cut = make_completion([2] * 10, 1.0, finish_reason="length")
        result = trainer.update([make_group([1] * 6, cut, make_completion([3] * 4, 1.0))])
        assert result.metrics["reward/overlong"] == -0.5  # -1 at the limit of 10, and 0
        return gradients(trainer)

    reference = gradient(16, 16, None)
    assert any(each.any() for each in reference), "both pass: only the penalty differs"
    for one, other in zip(gradient(max_new_tokens, model, max_context), reference, strict=True):
        assert torch.equal(one, other)


def test_training_is_bitwise_deterministic(tmp_path: Path):
    one, other = (make_trainer(tmp_path / name, lr=0.01) for name in ("one", "other"))
    for seed in range(3):
        assert one.update(random_groups(seed)).metrics == other.update(random_groups(seed)).metrics
    for a, b in zip(parameters(one), parameters(other), strict=True):
        assert torch.equal(a, b)


def test_token_ids_outside_the_vocabulary_are_rejected(tmp_path: Path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ModelError, match=r"token ids 1\.\.11, the model has 11"):
        trainer.update([make_group([1], make_completion([11], 1.0), make_completion([2], 0.0))])


def test_a_tied_weight_is_sent_once_in_layer_order(tmp_path: Path):
    names = [name for name, _ in make_trainer(tmp_path).weights()]
    assert names[0] == "model.embed_tokens.weight"
    assert names[1].startswith("model.layers.0.")
    assert names[-1] == "model.norm.weight"
    assert "lm_head.weight" not in names
    assert len(set(names)) == len(names)


def test_the_probability_of_rewarded_tokens_increases(tmp_path: Path):
    """Samples are drawn from the current policy. A first token of 7 has reward 1."""
    trainer = make_trainer(tmp_path, lr=0.02, warmup_updates=0, weight_decay=0.0)
    random = torch.Generator().manual_seed(0)

    def first_token_logprobs() -> torch.Tensor:
        with torch.no_grad():
            return trainer.model(input_ids=torch.tensor([[1, 2]])).logits[0, -1].log_softmax(-1)

    before = first_token_logprobs().exp()[7].item()
    for _ in range(40):
        logprobs_V = first_token_logprobs()
        tokens = torch.multinomial(logprobs_V.exp(), 32, replacement=True, generator=random)
        completions = [
            make_completion([token], float(token == 7), [logprobs_V[token].item()])
            for token in tokens.tolist()
        ]
        result = trainer.update([make_group([1, 2], *completions)])
        if result.metrics["zero_signal_groups"] == 0.0:
            assert result.metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert before < 0.3
    assert first_token_logprobs().exp()[7].item() > 0.9


def make_policy(config: PreTrainedConfig) -> Policy:
    torch.manual_seed(0)
    return Policy(AutoModelForCausalLM.from_config(config).eval(), temperature=1.0)


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 11,
}


def test_a_model_family_with_logits_scaling_is_rejected():
    scaled = GraniteConfig(**SMALL, logits_scaling=8.0, initializer_range=1e-4)
    with pytest.raises(ModelError, match="changes its logits after the head"):
        check_policy(make_policy(scaled), None)


def test_a_sliding_window_disables_shared_prompts():
    assert check_policy(
        make_policy(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11)), None
    )
    assert not check_policy(make_policy(MistralConfig(**SMALL, sliding_window=64)), None)


def test_the_error_names_a_missing_model_folder(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no config\.json: set model\.path"):
        load_model(tmp_path / "absent", device="cpu")


def test_truncated_and_incomplete_weights_are_rejected(tmp_path: Path):
    folder = save_tiny_llama(tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder, device="cpu")

    weights.write_bytes(whole)
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(ModelError, match=r"lacks \d+ weights, such as model\.layers\.2"):
        load_model(folder, device="cpu")


def test_activation_checkpointing_preserves_gradients_with_dropout_and_saves_memory(tmp_path: Path):
    folder = save_tiny_llama(tmp_path, attention_dropout=0.5, num_hidden_layers=4)
    updates, peaks, products = [], [], []
    for kind in CHECKPOINTING:
        trainer = Trainer(
            config=make_config(folder, grad_clip=UNLIMITED),
            model=load_model(folder, device="cpu", activation_checkpointing=kind),
        )
        with LiveBytes() as live:
            trainer.update(random_groups(0, num_groups=40))
        products.append(sum(live.calls[name] for name in ("aten::mm", "aten::addmm")))
        updates.append(gradients(trainer))
        peaks.append(live.peak)
    for plain, selective, full in zip(*updates, strict=True):
        torch.testing.assert_close(plain, selective)
        torch.testing.assert_close(plain, full)
    assert peaks[0] > 1.2 * peaks[1]
    assert peaks[1] > 1.2 * peaks[2]
    assert products[0] == products[1] < products[2]


# --- the canary ---------------------------------------------------------------------------------


def test_the_canary_uses_temperature_one_and_the_current_weights(
    tmp_path: Path,
):
    trainer = make_trainer(tmp_path, temperature=0.5, lr=1e-2, warmup_updates=0)
    before = trainer.canary()
    trainer.update(random_groups(0))
    after = trainer.canary()
    assert after.token_ids == before.token_ids and after.logprobs != before.logprobs
    token_ids = torch.tensor(after.token_ids)
    with torch.no_grad():
        logits_LV = trainer.model(input_ids=token_ids[None], use_cache=False).logits[0]
    expected = logits_LV[:-1].log_softmax(-1).gather(1, token_ids[1:, None])[:, 0]
    assert torch.allclose(torch.tensor(after.logprobs), expected, atol=1e-5)


def test_measuring_the_canary_does_not_affect_training(tmp_path: Path):
    ours, theirs = make_trainer(tmp_path), make_trainer(tmp_path)
    for seed in range(2):
        ours.update(random_groups(seed))
        theirs.update(random_groups(seed))
        assert theirs.canary() == theirs.canary()
    for mine, yours in zip(parameters(ours), parameters(theirs), strict=True):
        assert torch.equal(mine, yours)


def test_the_canary_fits_the_context(tmp_path: Path):
    save_tiny_llama(tmp_path, max_position_embeddings=20)
    model = load_model(tmp_path, device="cpu")
    policy = Policy(model, temperature=1.0)
    assert len(CanaryProbe(model).measure(policy).token_ids) == 20
    assert len(CanaryProbe(model, max_context=7).measure(policy).token_ids) == 7


def test_the_canary_of_diverged_weights_raises(tmp_path: Path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        next(trainer.model.parameters())[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"non-finite .* diverged; lower learner\.lr"):
        trainer.canary()


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_compiled_layers_train_as_the_others(
    tmp_path: Path, lora_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the graphs of torch.compile, but without its code generation, which takes a minute."""
    from torch._dynamo import config as dynamo

    monkeypatch.setattr(dynamo, "fail_on_recompile_limit_hit", True)
    objective = ObjectiveConfig(kl_coefficient=0.1, entropy_coefficient=0.01)
    settings = {"objective": objective, "passes": 2, "lora_rank": lora_rank, "warmup_updates": 0}
    plain, compiled = (make_trainer(tmp_path, **settings) for _ in range(2))
    compile_layers(compiled.model, backend="aot_eager")
    for seed in range(3):  # rows of other numbers and lengths
        for trainer in (plain, compiled):
            trainer.update(random_groups(seed, num_groups=1 + seed))
            trainer.canary()
    names = [name for name, _ in plain.weights()]
    expected, found = plain.whole(names), compiled.whole(names)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_family_that_does_not_name_its_layers_is_not_compiled(tmp_path: Path) -> None:
    model = load_model(save_tiny_llama(tmp_path), device="cpu")
    model._no_split_modules = None
    with pytest.raises(ModelError, match=r"set learner\.compile to false"):
        compile_layers(model)
