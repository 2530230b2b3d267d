"""KL divergence, entropy bonus and overlong filtering, against direct sums over tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from speed_async.algorithms.regularization import MAX_K3, MAX_KL_RATIO
from speed_async.config.checks.combinations import check_combinations
from speed_async.config.sections.objective import ObjectiveConfig
from speed_async.config.sections.task import TaskConfig
from speed_async.learner.model import load_model
from speed_async.learner.trainer import Trainer
from speed_async.types import Group
from tests.fakes.learner_samples import (
    make_completion,
    make_config,
    make_group,
    random_groups,
    save_tiny_llama,
)

FACTOR, CAP = 0.2, MAX_KL_RATIO
TEMPERATURE = 0.8


def make_trainer(folder: Path, **objective: Any) -> Trainer:
    """The trained model differs from the start model, which is the reference."""
    chosen = ObjectiveConfig(policy_loss="policy_gradient", **objective)
    config = make_config(
        folder, objective=chosen, temperature=TEMPERATURE, lr=0.0, grad_clip=1e9,
        weight_decay=0.0,
    )  # fmt: skip
    return Trainer(config=config, model=trained_model(folder))


def trained_model(folder: Path):
    return load_model(save_tiny_llama(folder.parent / "trained", seed=7), device="cpu")


def flat_group() -> Group:
    return make_group([1, 2], make_completion([3, 4], 1.0), make_completion([5], 1.0))


def distribution(model: torch.nn.Module, group: Group, i: int) -> torch.Tensor:
    """log pi (T, V) at the positions of completion i."""
    prompt = group.prompt_token_ids.tolist()
    token_ids = group.completions[i].sampled.token_ids.tolist()
    logits_LV = model(input_ids=torch.tensor([prompt + token_ids])).logits[0]
    return (logits_LV[len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)


def of_tokens(logprobs_TV: torch.Tensor, group: Group, i: int) -> torch.Tensor:
    token_ids_T = torch.from_numpy(group.completions[i].sampled.token_ids).long()
    return logprobs_TV.gather(-1, token_ids_T[:, None])[:, 0]


def direct_loss(
    model: torch.nn.Module, reference: torch.nn.Module, groups: Sequence[Group], kind: str
) -> torch.Tensor:
    loss, num_tokens = torch.zeros(()), 0
    for group in groups:
        rewards = [completion.reward for completion in group.completions]
        pairs = []
        for i in range(len(group.completions)):
            pi_TV = distribution(model, group, i)
            with torch.no_grad():
                ref_T = of_tokens(distribution(reference, group, i), group, i)
            pairs.append((pi_TV, of_tokens(pi_TV, group, i), ref_T))
        if kind == "k1":
            rewards = [
                reward - FACTOR * float((pi_T - ref_T).detach().sum())
                for reward, (_, pi_T, ref_T) in zip(rewards, pairs, strict=True)
            ]
        for i, (pi_TV, pi_T, ref_T) in enumerate(pairs):
            others = rewards[:i] + rewards[i + 1 :]
            loss = loss - (rewards[i] - sum(others) / len(others)) * pi_T.sum()
            mu_T = torch.from_numpy(group.completions[i].sampled.logprobs)
            rho_T = (pi_T.detach() - mu_T).exp().clamp(max=CAP)
            if kind == "k2":
                loss = loss + FACTOR * (rho_T * (pi_T - ref_T) ** 2 / 2).sum()
            elif kind == "k3":
                ratio_T = (ref_T - pi_T).exp()
                k3_T = (ratio_T - 1 - ratio_T.log()).clamp(max=MAX_K3)
                loss = loss + FACTOR * (rho_T * k3_T).sum()
            elif kind == "entropy":
                loss = loss + FACTOR * (pi_TV.exp() * pi_TV).sum()
            num_tokens += len(pi_T)
    return loss / num_tokens


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "entropy"])
def test_the_gradient_matches_a_direct_implementation(tmp_path: Path, kind: str):
    """A group of equal rewards has a gradient too."""
    save_tiny_llama(tmp_path / "start")
    chosen: dict[str, Any] = {"kl": kind, "kl_coefficient": FACTOR}
    if kind == "entropy":
        chosen = {"entropy_coefficient": FACTOR}
    trainer = make_trainer(tmp_path / "start", **chosen)
    groups = [*random_groups(0), flat_group()]
    model = trained_model(tmp_path / "start")
    direct_loss(model, load_model(tmp_path / "start", device="cpu"), groups, kind).backward()

    result = trainer.update(groups)

    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    assert ("reference_kl_k3" in result.metrics) is (kind != "entropy")


def test_the_reference_is_the_start_model_and_is_not_trained(tmp_path: Path):
    folder = save_tiny_llama(tmp_path)
    chosen = ObjectiveConfig(kl_coefficient=0.1)
    config = make_config(folder, objective=chosen, lr=0.01, warmup_updates=0)
    trainer = Trainer(config=config, model=load_model(folder, device="cpu"))
    first, second = (trainer.update(random_groups(0)).metrics for _ in range(2))
    assert first["reference_kl_k3"] == pytest.approx(0.0, abs=1e-9)
    assert second["reference_kl_k3"] > 1e-4


def test_truncated_completions_stay_in_the_baselines_and_have_no_gradient(tmp_path: Path):
    """Rewards 1, 0 and 0: RLOO advantages 1, -1/2, -1/2. The last completion is truncated; its
    tokens count in the denominator."""
    save_tiny_llama(tmp_path / "start")
    group = make_group(
        [1], make_completion([2, 3], 1.0), make_completion([4], 0.0),
        make_completion([5, 6, 7], 0.0, finish_reason="length"),
    )  # fmt: skip
    model = trained_model(tmp_path / "start")
    logprobs = [of_tokens(distribution(model, group, i), group, i).sum() for i in range(2)]
    ((-1.0 * logprobs[0] + 0.5 * logprobs[1]) / 6).backward()
    trainer = make_trainer(tmp_path / "start", mask_truncated=True)

    trainer.update([group])

    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_a_reward_of_truncated_completions_contradicts_their_mask(tmp_path: Path):
    folder = save_tiny_llama(tmp_path)
    config = make_config(folder, objective=ObjectiveConfig(mask_truncated=True))

    def fields(**task: Any) -> list[str]:
        changed = config.model_copy(update={"task": TaskConfig(name="arithmetic", **task)})
        return [error.field for error in check_combinations(changed)]

    assert fields(truncated_reward=-0.5) == ["objective.mask_truncated"]
    assert fields(truncated_reward=-0.5, score_truncated=True) == fields() == []
