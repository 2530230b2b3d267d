"""The trainer: one optimiser update per batch of groups, and its checkpoints."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from speed_async.algorithms.diagnostics import (
    Diagnostics,
    batch_metrics,
    screening_metrics,
    shaping_metrics,
)
from speed_async.algorithms.loss_tokens import LossTokens
from speed_async.algorithms.objective import GroupSignal, Objective, compute_signals, make_objective
from speed_async.config.local_model import model_folder
from speed_async.config.schema import Config
from speed_async.errors import ModelError
from speed_async.learner.batch import MicroBatch, make_micro_batch
from speed_async.learner.canary_probe import CanaryProbe
from speed_async.learner.checkpoint.best import BestCheckpoints
from speed_async.learner.checkpoint.files import check_can_save, load_checkpoint, save_checkpoint
from speed_async.learner.checkpoint.model_files import read_model_files
from speed_async.learner.checkpoint.store import checkpoint_folder, prune
from speed_async.learner.model import context_length, embedding_table
from speed_async.learner.optimizer import make_optimizer, set_lr, warmed_up_lr
from speed_async.learner.policy import Policy, check_policy, layout_cost
from speed_async.learner.progress import Progress
from speed_async.learner.rows import choose_width, split_row, split_rows, training_row
from speed_async.types import Group
from speed_async.weight_sync.canary_check import Canary

CPU_MICRO_BATCH_TOKENS = 2048
"""Larger micro-batches exceed the cache of a CPU core and cost more per token (measured)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """Result of one update. Metrics are finite; unavailable values are absent."""

    skipped: bool
    skip_reason: str
    tokens: int
    completions: int
    metrics: dict[str, float]
    train_s: float


class Trainer:
    """Owns the policy and the optimiser. On a CPU, updates are bitwise deterministic."""

    def __init__(
        self,
        *,
        config: Config,
        model: PreTrainedModel,
        objective: Objective | None = None,
        clock: Callable[[], float] = time.perf_counter,
        run_id: str = "",
    ) -> None:
        """`model` is a result of `load_model`. `objective` None builds the configured objective.
        `run_id` is stored in every checkpoint.

        Raises ModelError when the learner does not support the model.
        """
        self.model = model
        self.num_updates = 0
        """Number of `update` calls, including skipped updates. It is the policy version, and
        determines the warm-up."""
        self.num_skipped = 0
        self._run_id = run_id
        self._punishes_length = config.objective.overlong_share > 0
        self._config = config.learner
        self._checkpoints = Path(config.run.folder) / "checkpoints"
        self.best = BestCheckpoints(self._checkpoints)
        self._model_files = read_model_files(model_folder(config.model.path))
        self._clock = clock
        context = context_length(model, config.model.context_length)
        self._objective = objective or make_objective(config, context_length=context)
        self._device = next(model.parameters()).device
        self._policy = Policy(model, temperature=config.actors.temperature)
        self._can_share_prompts = check_policy(self._policy)
        self._layout_cost = layout_cost(model)
        self._canary_probe = CanaryProbe(
            model, max_context=config.model.context_length, seed=config.run.seed
        )
        self._optimizer = make_optimizer(model, config.learner)

    def update(self, groups: Sequence[Group]) -> UpdateResult:
        """One gradient step on all groups; skipped when a value is not finite.

        Completions with zero advantage and dropped screening samples count in the denominators of
        the aggregation. They have no gradient and are not computed. Raises ModelError for token ids
        outside the vocabulary of the model, and ValueError for a group of one completion, an empty
        prompt, or no groups.
        """
        started_s = self._clock()
        if not groups:
            raise ValueError("an update needs at least one group")
        self._check_token_ids(groups)
        lr = warmed_up_lr(self._config, self.num_updates)
        metrics = batch_metrics(groups) | {"lr": lr}
        reason = "" if _inputs_finite(groups) else "a reward or behaviour log-probability"
        if not reason:
            set_lr(self._optimizer, lr)
            signals = compute_signals(self._objective, groups)
            step_metrics = self._step(groups, signals)
            metrics |= screening_metrics(groups, signals) | step_metrics
            if self._punishes_length:
                metrics |= shaping_metrics(signals)
            if non_finite := [
                key for key in ("loss", "grad_norm") if not math.isfinite(step_metrics[key])
            ]:
                reason = " and ".join(non_finite)
        self.num_updates += 1
        self.num_skipped += bool(reason)
        metrics["skipped_updates"] = float(self.num_skipped)
        metrics["optimizer_updates"] = float(self.num_updates - self.num_skipped)
        return UpdateResult(
            skipped=bool(reason),
            skip_reason=f"not finite: {reason}" if reason else "",
            tokens=sum(group.num_tokens for group in groups),
            completions=sum(len(group.completions) for group in groups),
            metrics={key: value for key, value in metrics.items() if math.isfinite(value)},
            train_s=self._clock() - started_s,
        )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights to broadcast: each distinct parameter once, in layer order, float32, valid until
        the next update. A tied parameter has its first name."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def canary(self) -> Canary:
        """Canary of the current weights, which receivers verify. Runs one short forward pass.
        Raises ModelError when the weights have diverged."""
        return self._canary_probe.measure(self._policy)

    def check_save(self) -> None:
        """Checks before training that a checkpoint can be saved, without writing tensors.

        Raises SpeedAsyncError with the cause and the remedy.
        """
        folder = checkpoint_folder(self._checkpoints, self.num_updates)
        check_can_save(folder, model=self.model, model_files=self._model_files)

    def save(self, progress: Progress) -> int:
        """Writes a checkpoint of the current state, then removes all but the newest
        `learner.keep_last` and those in `best.kept`. Returns the oldest version that can be
        resumed.

        Raises OSError; all older checkpoints are then unchanged.
        """
        progress = replace(progress, run_id=self._run_id)
        save_checkpoint(
            checkpoint_folder(self._checkpoints, progress.policy_version),
            model=self.model,
            optimizer=self._optimizer,
            model_files=self._model_files,
            progress=progress,
        )
        return prune(self._checkpoints, self._config.keep_last, self.best.kept)

    def restore(self, folder: Path, *, is_whole: bool = False) -> Progress:
        """Restores the state written by `save`; `is_whole` as for `load_checkpoint`.

        Raises ModelError.
        """
        progress = load_checkpoint(
            folder, model=self.model, optimizer=self._optimizer, is_whole=is_whole
        )
        self.num_updates = progress.policy_version
        self.num_skipped = progress.num_skipped
        return progress

    def _step(self, groups: Sequence[Group], signals: Sequence[GroupSignal]) -> dict[str, float]:
        """Accumulates the gradient over all micro-batches, then steps if all values are finite."""
        diagnostics = Diagnostics()
        self._optimizer.zero_grad(set_to_none=True)
        for batch in self._micro_batches(groups, signals):
            logprobs_N, entropies_N = self._policy(batch)
            tokens = LossTokens(
                logprobs_N=logprobs_N,
                behaviour_logprobs_N=batch.behaviour_logprobs_N,
                advantages_N=batch.advantages_N,
                ages_N=batch.ages_N,
                sequence_ids_N=batch.sequence_ids_N,
                num_sequences=batch.num_sequences,
            )
            corrected = self._objective.correction(tokens)
            losses = self._objective.policy_loss(tokens, corrected)
            loss = (batch.weights_N * losses.losses_N).sum()
            loss.backward()
            diagnostics.add(tokens, corrected, losses, loss=loss, entropies_N=entropies_N)
        self._fill_missing_gradients()
        metrics = diagnostics.metrics()
        metrics["grad_norm"] = float(
            torch.nn.utils.clip_grad_norm_(
                self.model.parameters(), self._config.grad_clip, foreach=True
            )
        )
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            self._optimizer.step()
        return metrics

    def _micro_batches(
        self, groups: Sequence[Group], signals: Sequence[GroupSignal]
    ) -> Sequence[MicroBatch]:
        group_rows = [
            training_row(
                group,
                advantages_N=signal.advantages_N,
                weights_N=signal.weights_N,
                kept_N=signal.kept_N,
            )
            for group, signal in zip(groups, signals, strict=True)
        ]
        width = choose_width(group_rows, self._layout_cost) if self._can_share_prompts else 1
        rows = list(chain.from_iterable(split_row(row, width) for row in group_rows))
        max_tokens = self._config.micro_batch_tokens
        if self._device.type == "cpu":
            max_tokens = min(max_tokens, CPU_MICRO_BATCH_TOKENS)
        return [
            make_micro_batch(part, policy_version=self.num_updates).to(self._device)
            for part in split_rows(rows, max_tokens)
        ]

    def _fill_missing_gradients(self) -> None:
        """Sets missing gradients to zero: a batch without signal is still a step, with momentum and
        weight decay."""
        for parameter in self.model.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def _check_token_ids(self, groups: Sequence[Group]) -> None:
        arrays = [group.prompt_token_ids for group in groups]
        arrays += [c.sampled.token_ids for group in groups for c in group.completions]
        token_ids = np.concatenate(arrays)
        num_token_ids = embedding_table(self.model).shape[0]
        if token_ids.min() < 0 or token_ids.max() >= num_token_ids:
            raise ModelError(
                f"a group has token ids {token_ids.min()}..{token_ids.max()}, the model has "
                f"{num_token_ids}: actors and learner must use the same model folder"
            )


def _inputs_finite(groups: Sequence[Group]) -> bool:
    completions = [c for group in groups for c in group.completions]
    logprobs = np.concatenate([c.sampled.logprobs for c in completions])
    return bool(np.isfinite(logprobs).all()) and all(math.isfinite(c.reward) for c in completions)
