"""Tiny models and groups for the learner's tests."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speed_async.algorithms.loss_tokens import LossTokens
from speed_async.config.schema import Config
from speed_async.config.sections.actors import ActorsConfig
from speed_async.config.sections.gate import GateConfig
from speed_async.config.sections.learner import LearnerConfig
from speed_async.config.sections.model import ModelConfig
from speed_async.config.sections.objective import ObjectiveConfig
from speed_async.config.sections.run import RunConfig
from speed_async.config.sections.task import TaskConfig
from speed_async.types import Completion, FinishReason, Group, Sampled

VOCABULARY = 11


def save_tiny_llama(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,  # far from uniform, so that a wrong mask changes the result
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(folder)
    return folder


def make_config(
    folder: Path,
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    objective: ObjectiveConfig | None = None,
    gate: GateConfig | None = None,
    **learner: Any,
) -> Config:
    return Config(
        run=RunConfig(folder=str(folder / "run")),
        model=ModelConfig(path=str(folder)),
        task=TaskConfig(name="arithmetic"),
        gate=gate or GateConfig(),
        actors=ActorsConfig(temperature=temperature, max_new_tokens=max_new_tokens),
        objective=objective or ObjectiveConfig(),
        learner=LearnerConfig(device="cpu", **learner),
    )


def make_completion(
    token_ids: list[int],
    reward: float,
    logprobs: list[float] | None = None,
    *,
    policy_version: int = 0,
    finish_reason: FinishReason = "stop",
) -> Completion:
    return Completion(
        sampled=Sampled(
            token_ids=np.array(token_ids, dtype=np.int32),
            logprobs=np.array(
                logprobs if logprobs is not None else [-2.0] * len(token_ids), dtype=np.float32
            ),
            policy_versions=np.full(len(token_ids), policy_version, dtype=np.int32),
            finish_reason=finish_reason,
        ),
        reward=reward,
        passed=reward >= 1.0,
    )


def make_loss_tokens(
    pi: list[float],
    mu: list[float],
    advantages: list[float],
    *,
    ages: list[int] | None = None,
    sequences: list[int] | None = None,
) -> LossTokens:
    """`pi` and `mu` are probabilities. By default, each token is its own sequence."""
    sequences = sequences or list(range(len(pi)))
    return LossTokens(
        logprobs_N=torch.tensor(pi, dtype=torch.float64).log().requires_grad_(),
        behaviour_logprobs_N=torch.tensor(mu, dtype=torch.float64).log(),
        advantages_N=torch.tensor(advantages, dtype=torch.float64),
        ages_N=torch.tensor(ages or [0] * len(pi)),
        sequence_ids_N=torch.tensor(sequences),
        num_sequences=max(sequences) + 1,
    )


def make_group(
    prompt: list[int], *completions: Completion, lease_id: int = 0, num_screening: int = 0
) -> Group:
    return Group(
        lease_id=lease_id,
        prompt_id=lease_id,
        prompt_token_ids=np.array(prompt, dtype=np.int32),
        completions=completions,
        num_screening=num_screening,
    )


def random_groups(seed: int, *, num_groups: int = 3) -> list[Group]:
    """Groups of 2 to 6 completions of 1 to 7 tokens, with rewards 0 or 1, not all equal."""
    rng = np.random.default_rng(seed)
    groups = []
    for lease_id in range(num_groups):
        completions = []
        for i in range(int(rng.integers(2, 7))):
            length = int(rng.integers(1, 8))
            completions.append(
                make_completion(
                    rng.integers(0, VOCABULARY, length).tolist(),
                    float(rng.integers(0, 2)) if i > 1 else float(i),
                    (-rng.uniform(0.5, 4.0, length)).tolist(),
                )
            )
        prompt = rng.integers(0, VOCABULARY, int(rng.integers(1, 9))).tolist()
        groups.append(make_group(prompt, *completions, lease_id=lease_id))
    return groups
