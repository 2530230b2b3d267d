"""Several optimiser updates per batch, against a direct implementation with torch's AdamW."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from speed_async.algorithms.loss_tokens import Corrected, LossTokens, TokenLosses
from speed_async.algorithms.objective import make_objective
from speed_async.config.checks.combinations import check_combinations
from speed_async.config.schema import Config
from speed_async.config.sections.objective import ObjectiveConfig
from speed_async.learner.minibatches import split_groups
from speed_async.learner.model import load_model
from speed_async.learner.trainer import Trainer
from speed_async.types import Completion, Group
from tests.fakes.learner_samples import make_config, random_groups, save_tiny_llama

LR = 0.01
LOW, HIGH, DUAL, CAP = 0.2, 0.28, 3.0, 1.3
TokenLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Maps log pi with gradient, log pi_prox, log mu, each (T,), and the advantage to losses (T,)."""


def clipped_at_mu(
    pi_T: torch.Tensor, prox_T: torch.Tensor, mu_T: torch.Tensor, advantage: float
) -> torch.Tensor:
    ratio_T = (pi_T - mu_T).exp()
    gain_T = torch.minimum(ratio_T * advantage, ratio_T.clamp(1 - LOW, 1 + HIGH) * advantage)
    return -gain_T.clamp(min=DUAL * advantage) if advantage < 0 else -gain_T


def decoupled(
    pi_T: torch.Tensor, prox_T: torch.Tensor, mu_T: torch.Tensor, advantage: float
) -> torch.Tensor:
    """Clipped at pi_prox, weighted by pi_prox / mu, which is at most CAP."""
    return (prox_T - mu_T).exp().clamp(max=CAP) * clipped_at_mu(pi_T, prox_T, prox_T, advantage)


def reinforce(
    pi_T: torch.Tensor, prox_T: torch.Tensor, mu_T: torch.Tensor, advantage: float
) -> torch.Tensor:
    """Weighted by the ratio of the current policy."""
    return -(pi_T - mu_T).detach().exp().clamp(max=CAP) * advantage * pi_T


def logprobs(model: torch.nn.Module, group: Group, completion: Completion) -> torch.Tensor:
    """log pi (T,), with gradient."""
    prompt, token_ids = group.prompt_token_ids.tolist(), completion.sampled.token_ids.tolist()
    logits_LV = model(input_ids=torch.tensor([prompt + token_ids])).logits[0]
    logprobs_TV = logits_LV[len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs_TV.gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


class Reference:
    """Trains on mini-batches with advantages normalised over the batch, and losses averaged over
    the tokens of the mini-batch."""

    def __init__(self, folder: Path, token_loss: TokenLoss) -> None:
        self.model = load_model(folder, device="cpu")
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)
        self._token_loss = token_loss

    def update(self, groups: Sequence[Group], minibatches: Sequence[Sequence[int]]) -> None:
        rewards = np.array([c.reward for group in groups for c in group.completions])
        mean, std = rewards.mean(), rewards.std(ddof=1) + 1e-4
        with torch.no_grad():
            prox = {
                (i, j): logprobs(self.model, group, completion)
                for i, group in enumerate(groups)
                for j, completion in enumerate(group.completions)
            }
        for part in minibatches:
            self._optimizer.zero_grad()
            loss, num_tokens = torch.zeros(()), 0
            for i in part:
                for j, completion in enumerate(groups[i].completions):
                    losses_T = self._token_loss(
                        logprobs(self.model, groups[i], completion),
                        prox[i, j],
                        torch.from_numpy(completion.sampled.logprobs),
                        (completion.reward - mean) / std,
                    )
                    loss, num_tokens = loss + losses_T.sum(), num_tokens + len(losses_T)
            (loss / num_tokens).backward()
            self._optimizer.step()


def make_trainer(folder: Path, *, objective: ObjectiveConfig | None = None, **learner: Any):
    settings = {"lr": LR, "warmup_updates": 0, "weight_decay": 0.0, "grad_clip": 1e9} | learner
    config = make_config(folder, objective=objective, **settings)
    return Trainer(config=config, model=load_model(folder, device="cpu"))


def parameters(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def nearby_groups(folder: Path, num_groups: int) -> list[Group]:
    """Random groups, sampled close to the policy in `folder`: |log pi - log mu| <= 0.4."""
    model, rng = load_model(folder, device="cpu"), np.random.default_rng(0)
    groups = []
    for group in random_groups(5, num_groups=num_groups):
        completions = []
        for completion in group.completions:
            with torch.no_grad():
                pi_T = logprobs(model, group, completion).numpy()
            mu_T = (pi_T + rng.uniform(-0.4, 0.4, len(pi_T))).astype(np.float32)
            completions.append(
                replace(completion, sampled=replace(completion.sampled, logprobs=mu_T))
            )
        groups.append(replace(group, completions=tuple(completions)))
    return groups


OBJECTIVES = {
    "mu": (clipped_at_mu, {"policy_loss": "ppo_clip", "correction": "none"}),
    "pi_prox": (decoupled, {"policy_loss": "ppo_clip", "correction": "token_tis"}),
    "no ratio": (reinforce, {"policy_loss": "policy_gradient", "correction": "token_tis"}),
}


@pytest.mark.parametrize("anchor", OBJECTIVES)
@pytest.mark.parametrize(("passes", "minibatches"), [(3, 1), (1, 2), (2, 4)])
def test_updates_match_a_direct_implementation(
    tmp_path: Path, anchor: str, passes: int, minibatches: int
):
    token_loss, chosen = OBJECTIVES[anchor]
    save_tiny_llama(tmp_path)
    groups = nearby_groups(tmp_path, 4)
    reference = Reference(tmp_path, token_loss)
    start = parameters(reference.model)
    parts = [
        part for index in range(passes) for part in split_groups(4, minibatches, seed=(0, 0, index))
    ]
    reference.update(groups, parts)
    trainer = make_trainer(
        tmp_path, passes=passes, minibatches=minibatches,
        objective=ObjectiveConfig(**chosen, advantage="batch", max_ratio=CAP),  # pyright: ignore
    )  # fmt: skip

    result = trainer.update(groups)

    assert (result.optimizer_updates, result.num_skipped) == (passes * minibatches, 0)
    assert result.metrics["optimizer_updates"] == passes * minibatches
    assert result.metrics["lr"] == LR
    triples = zip(start, parameters(reference.model), parameters(trainer.model), strict=True)
    for before, theirs, ours in triples:
        assert (theirs - before).abs().max() > LR / 2
        torch.testing.assert_close(ours, theirs, atol=LR * 0.03, rtol=0)


def test_a_policy_version_has_the_same_tokens_whatever_the_number_of_optimiser_updates(
    tmp_path: Path,
):
    save_tiny_llama(tmp_path)
    trainer = make_trainer(tmp_path, passes=2, minibatches=3)
    first, second = (trainer.update(random_groups(seed, num_groups=3)) for seed in range(2))
    assert trainer.num_updates == 2
    assert first.metrics["optimizer_updates"] == 6
    assert second.metrics["optimizer_updates"] == 12
    assert first.tokens == sum(group.num_tokens for group in random_groups(0))


def test_groups_are_shuffled_once_per_pass_by_seed_version_and_pass():
    splits = [
        split_groups(12, 4, seed=seed) for seed in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    ]
    for parts in splits:
        assert [len(part) for part in parts] == [3, 3, 3, 3]
        assert sorted(chain.from_iterable(parts)) == [*range(12)]
    assert len({str(parts) for parts in splits}) == 4
    assert split_groups(12, 4, seed=(0, 0, 0)) == splits[0]
    assert split_groups(5, 1, seed=(0, 0, 0)) == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="2 groups cannot be split into 3 mini-batches"):
        split_groups(2, 3, seed=(0, 0, 0))


def test_a_non_finite_mini_batch_skips_only_its_own_optimiser_update(tmp_path: Path):
    """The loss of the mini-batch with the first group is infinite."""
    save_tiny_llama(tmp_path)
    infinite_advantage = 777.0

    def sometimes_infinite(tokens: LossTokens, corrected: Corrected) -> TokenLosses:
        is_infinite_N = tokens.advantages_N == infinite_advantage
        scale_N = torch.where(is_infinite_N, math.inf, 1.0)
        return TokenLosses(
            losses_N=tokens.logprobs_N * scale_N, clipped_N=torch.zeros_like(is_infinite_N)
        )

    config = make_config(tmp_path, lr=LR, passes=2, minibatches=2)
    objective = make_objective(config)
    groups = random_groups(0, num_groups=2)
    objective = replace(
        objective,
        policy_loss=sometimes_infinite,
        advantages=lambda rewards: [
            np.full(len(r), infinite_advantage if r is rewards[0] else 1.0) for r in rewards
        ],
    )
    trainer = Trainer(config=config, model=load_model(tmp_path, device="cpu"), objective=objective)
    before = parameters(trainer.model)

    result = trainer.update(groups)

    assert not result.skipped
    assert (result.optimizer_updates, result.num_skipped) == (2, 2)
    assert result.skip_reason == "not finite: loss and grad_norm in 2 of 4 optimiser updates"
    assert result.metrics["skipped_updates"] == 2.0
    assert math.isfinite(result.metrics["loss"])  # of the others
    pairs = list(zip(before, parameters(trainer.model), strict=True))
    assert all(torch.isfinite(new).all() for _, new in pairs)
    assert any(not torch.equal(old, new) for old, new in pairs)


def test_a_non_finite_input_skips_every_optimiser_update_of_the_batch(tmp_path: Path):
    save_tiny_llama(tmp_path)
    trainer = make_trainer(tmp_path, passes=2, minibatches=2)
    first, *others = random_groups(0, num_groups=2)
    broken = replace(first.completions[0], reward=math.nan)
    result = trainer.update([replace(first, completions=(broken, *first.completions[1:])), *others])
    assert result.skipped
    assert result.metrics["skipped_updates"] == 4.0
    assert result.metrics["optimizer_updates"] == 0.0


def errors_of(config: Config) -> dict[str, str]:
    return {error.field: str(error) for error in check_combinations(config)}


def test_mini_batches_divide_the_groups_of_a_batch(tmp_path: Path):
    save_tiny_llama(tmp_path)
    errors = errors_of(make_config(tmp_path, groups_per_update=16, minibatches=3))
    assert "does not divide learner.groups_per_update = 16" in errors["learner.minibatches"]
    assert not errors_of(make_config(tmp_path, groups_per_update=16, minibatches=4))


def test_several_optimiser_updates_need_a_ratio_or_a_correction(tmp_path: Path):
    save_tiny_llama(tmp_path)
    plain = ObjectiveConfig(policy_loss="policy_gradient")
    errors = errors_of(make_config(tmp_path, objective=plain, passes=2))
    assert "a batch has 2 optimiser updates" in errors["objective.correction"]
    assert not errors_of(make_config(tmp_path, objective=plain))
