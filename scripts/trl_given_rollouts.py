# pyright: reportMissingImports=false
"""TRL's GRPOTrainer with given rollouts instead of a model, for make_parity_vectors_trl.py.

Shape legend: B sequences, C completion tokens (padded to the longest).
"""

import dataclasses
from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator
from parity_inputs import Batch, short, without_padding
from torch import Tensor
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

PAD, TOKEN, EOS = 0, 1, 2


class Model(torch.nn.Module):
    """Only provides the training mode; no forward pass runs."""

    is_gradient_checkpointing = False


class Tokenizer:
    pad_token_id = PAD


class GivenRollouts(GRPOTrainer):
    """GRPOTrainer without a model: log pi, log mu, entropies, completions and rewards come from the
    batch.

    `__init__` sets the attributes that the trainer sets before training. `args` are GRPOConfig's.
    """

    def __init__(self, batch: Batch, args: GRPOConfig) -> None:
        options = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
        self.__dict__.update(options)
        self.args = args
        self.batch = batch
        self.logprobs_BC = padded(batch["logprobs"])
        self.entropies_BC = padded(batch["entropies"])
        self.accelerator = Accelerator(cpu=True)
        self.model = Model().train()
        self._tokenizer = Tokenizer()
        self.epsilon_low = args.epsilon
        self.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        self.reward_weights = torch.ones(1)
        self.reward_funcs, self.reward_func_names = [None], ["given"]
        self.environment_factories = self.environments = self.tools = None
        self.aux_loss_enabled = self._is_vlm = False
        self._entropy_bonus_enabled = args.entropy_coef != 0
        self.eos_token_ids = [EOS]
        self.ref_model = self.model
        self._metrics = {"train": defaultdict(list)}
        self._logs = {name: [] for name in ("prompt", "completion", "advantages")}
        self._logs |= {"rewards": defaultdict(list), "extra": defaultdict(list)}
        self._pending_extra_logs, self._pending_metrics = {}, {}

    def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
        ids = [[TOKEN] * length for length in self.batch["lengths"]]
        for completion, is_truncated in zip(ids, self.batch.get("truncated", ()), strict=False):
            completion[-1] = TOKEN if is_truncated else EOS
        texts = ["" for _ in ids]
        behaviour = self.batch["behaviour_logprobs"]
        return [[TOKEN] for _ in ids], ids, None, texts, behaviour, {}, None, None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return self.logprobs_BC, self.entropies_BC, None

    def _calculate_rewards(self, *args: Any) -> Tensor:
        return torch.tensor(self.batch["rewards"])[:, None]

    def score(self) -> dict[str, Tensor]:
        """The inputs that the trainer passes from generation to the loss."""
        return self._generate_and_score_completions([{"prompt": ""} for _ in self.batch["rewards"]])

    def answers(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Loss, and its gradients (B, ragged) with respect to log pi and, with an entropy bonus, to
        the entropies."""
        wanted = {"gradient": self.logprobs_BC.detach().requires_grad_()}
        self.logprobs_BC = wanted["gradient"]
        if self._entropy_bonus_enabled:
            wanted["entropy_gradient"] = self.entropies_BC.detach().requires_grad_()
            self.entropies_BC = wanted["entropy_gradient"]
        loss = self._compute_loss(self.model, inputs)
        gradients = torch.autograd.grad(loss, [*wanted.values()])
        return {"loss": short(loss.item())} | {
            name: short(without_padding(each_BC.tolist(), self.batch["lengths"]))
            for name, each_BC in zip(wanted, gradients, strict=True)
        }


def padded(rows: list[list[float]]) -> Tensor:
    """(B, ragged) -> (B, C) float64, padded with zeros at the end."""
    width = max(map(len, rows))
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows])
