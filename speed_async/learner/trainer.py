"""One optimiser update from one batch of groups."""

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

from speed_async.algorithms.diagnostics import Diagnostics, batch_metrics, screening_metrics
from speed_async.algorithms.loss_tokens import LossTokens
from speed_async.algorithms.objective import GroupSignal, Objective, compute_signals, make_objective
from speed_async.config.schema import Config
from speed_async.errors import ModelError
from speed_async.learner.batch import MicroBatch, make_micro_batch
from speed_async.learner.canary import CanaryProbe
from speed_async.learner.checkpoint.files import load_checkpoint, save_checkpoint, try_checkpoint
from speed_async.learner.checkpoint.model_files import read_model_files
from speed_async.learner.checkpoint.store import checkpoint_folder, prune
from speed_async.learner.model import context_length, embedding_table
from speed_async.learner.optimizer import make_optimizer, set_lr, warmed_up_lr
from speed_async.learner.parallel import Parallel
from speed_async.learner.policy import Policy, check_policy, layout_cost
from speed_async.learner.progress import Progress
from speed_async.learner.rows import choose_width, split_row, split_rows, training_row
from speed_async.types import Group
from speed_async.weight_sync.canary import Canary

CPU_MICRO_BATCH_TOKENS = 2048
"""Past this, activations leave the cache of a CPU core and every token costs more (measured)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """What one update did. Metrics are finite; a value that could not be had is absent."""

    skipped: bool
    skip_reason: str
    tokens: int
    completions: int
    metrics: dict[str, float]
    train_s: float


class Trainer:
    """Owns policy and optimiser. On a CPU two trainers given the same calls agree bit for bit."""

    def __init__(
        self,
        *,
        config: Config,
        model: PreTrainedModel,
        parallel: Parallel,
        objective: Objective | None = None,
        clock: Callable[[], float] = time.perf_counter,
        run_id: str = "",
    ) -> None:
        """`model` as `load_model` gives it; `objective` None makes the one of the config. `run_id`
        is noted in every checkpoint.

        Raises ModelError when the model cannot be trained here.
        """
        self.model = model
        self.num_updates = 0
        """Calls of `update`, skipped ones too: the policy version, which the warm-up follows."""
        self.num_skipped = 0
        self._run_id = run_id
        self._config = config.learner
        self._checkpoints = Path(config.run.folder) / "checkpoints"
        self._model_files = read_model_files(Path(config.model.path))
        self._parallel = parallel
        self._clock = clock
        context = context_length(model, config.model.context_length)
        self._objective = objective or make_objective(config, context_length=context)
        self._device = next(model.parameters()).device
        policy = Policy(model, temperature=config.actors.temperature)
        self._may_share_prompts = check_policy(policy)
        self._layout_cost = layout_cost(model)
        self._canary_probe = CanaryProbe(
            model, wanted=config.model.context_length, seed=config.run.seed
        )
        self._policy = parallel.wrap(policy)
        self._optimizer = make_optimizer(model, config.learner)

    def update(self, groups: Sequence[Group]) -> UpdateResult:
        """One gradient step on all groups, or none when a number is not finite.

        Completions of zero advantage, and screening samples that are dropped, count in the
        aggregation's denominators but are not run: they have no gradient. Raises ModelError for
        token ids the model does not have, ValueError for a group of one completion, an empty
        prompt, or no groups.
        """
        started_s = self._clock()
        if not groups:
            raise ValueError("an update needs at least one group")
        self._refuse_unknown_tokens(groups)
        lr = warmed_up_lr(self._config, self.num_updates)
        metrics = batch_metrics(groups) | {"lr": lr}
        reason = "" if _inputs_finite(groups) else "a reward or behaviour log-probability"
        if not reason:
            set_lr(self._optimizer, lr)
            signals = compute_signals(self._objective, groups)
            learned = self._step(groups, signals)
            metrics |= screening_metrics(groups, signals) | learned
            if bad := [key for key in ("loss", "grad_norm") if not math.isfinite(learned[key])]:
                reason = " and ".join(bad)
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
        """What actors need: each distinct parameter once, float32, valid until the next update."""
        return self._parallel.full_tensors(self.model)

    def canary(self) -> Canary:
        """What receivers of the present weights are to measure; one short forward pass, in which
        all learner ranks take part. Raises ModelError when the weights have diverged."""
        return self._canary_probe.measure(self._policy)

    def try_save(self) -> None:
        """Try what a checkpoint needs besides tensors, before there is anything to lose.

        Raises SpeedAsyncError that names what stands in the way, and the remedy.
        """
        folder = checkpoint_folder(self._checkpoints, self.num_updates)
        try_checkpoint(folder, model=self.model, model_files=self._model_files)

    def save(self, progress: Progress) -> int:
        """Write a checkpoint of the present state, then remove all but the newest
        `learner.keep_last`. Returns the oldest version that is kept.

        Raises OSError: older checkpoints are then all there still.
        """
        progress = replace(progress, run_id=self._run_id)
        save_checkpoint(
            checkpoint_folder(self._checkpoints, progress.policy_version),
            model=self.model,
            state=self._parallel.full_state(self.model, self._optimizer),
            model_files=self._model_files,
            progress=progress,
        )
        return prune(self._checkpoints, self._config.keep_last)

    def restore(self, folder: Path, *, is_whole: bool = False) -> Progress:
        """Go on exactly where `save` left off; `is_whole` as for `load_checkpoint`.

        Raises ModelError.
        """
        progress = load_checkpoint(
            folder, model=self.model, optimizer=self._optimizer, is_whole=is_whole
        )
        self.num_updates = progress.policy_version
        self.num_skipped = progress.num_skipped
        return progress

    def _step(self, groups: Sequence[Group], signals: Sequence[GroupSignal]) -> dict[str, float]:
        """Gradient over all micro-batches, then an optimiser step if everything is finite."""
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
        metrics["grad_norm"] = self._parallel.clip_grad_norm(self.model, self._config.grad_clip)
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            self._optimizer.step()
        return metrics

    def _micro_batches(
        self, groups: Sequence[Group], signals: Sequence[GroupSignal]
    ) -> Sequence[MicroBatch]:
        taught = [
            training_row(
                group,
                advantages_N=signal.advantages_N,
                weights_N=signal.weights_N,
                kept_N=signal.kept_N,
            )
            for group, signal in zip(groups, signals, strict=True)
        ]
        width = choose_width(taught, self._layout_cost) if self._may_share_prompts else 1
        rows = list(chain.from_iterable(split_row(row, width) for row in taught))
        max_tokens = self._config.micro_batch_tokens
        if self._device.type == "cpu":
            max_tokens = min(max_tokens, CPU_MICRO_BATCH_TOKENS)
        return [
            make_micro_batch(part, policy_version=self.num_updates).to(self._device)
            for part in split_rows(rows, max_tokens)
        ]

    def _fill_missing_gradients(self) -> None:
        """A batch without any signal is still a step: momentum and weight decay act on it."""
        for parameter in self.model.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def _refuse_unknown_tokens(self, groups: Sequence[Group]) -> None:
        arrays = [group.prompt_token_ids for group in groups]
        arrays += [c.sampled.token_ids for group in groups for c in group.completions]
        token_ids = np.concatenate(arrays)
        num_token_ids = embedding_table(self.model).shape[0]
        if token_ids.min() < 0 or token_ids.max() >= num_token_ids:
            raise ModelError(
                f"a group holds token ids {token_ids.min()}..{token_ids.max()}, the model has "
                f"{num_token_ids}: actors and learner must use the same model folder"
            )


def _inputs_finite(groups: Sequence[Group]) -> bool:
    completions = [c for group in groups for c in group.completions]
    logprobs = np.concatenate([c.sampled.logprobs for c in completions])
    return bool(np.isfinite(logprobs).all()) and all(math.isfinite(c.reward) for c in completions)
