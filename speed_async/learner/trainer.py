"""The trainer: the optimiser updates of one batch of groups, and checkpoints."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from speed_async.algorithms.diagnostics import batch_metrics, screening_metrics, shaping_metrics
from speed_async.algorithms.objective import (
    GroupSignal,
    Objective,
    completion_lengths,
    compute_signals,
    make_objective,
)
from speed_async.config.local_model import model_folder
from speed_async.config.schema import Config
from speed_async.learner.adapters import add_adapters, has_adapters, without_adapters
from speed_async.learner.batch_checks import check_token_ids, inputs_finite
from speed_async.learner.canary_probe import CanaryProbe
from speed_async.learner.checkpoint.best import BestCheckpoints
from speed_async.learner.checkpoint.captured import (
    Captured,
    TrainingTensors,
    capture_model,
    capture_training,
    write_training,
)
from speed_async.learner.checkpoint.dtypes import read_dtypes
from speed_async.learner.checkpoint.files import check_can_save, load_checkpoint, save_checkpoint
from speed_async.learner.checkpoint.model_files import read_model_files
from speed_async.learner.checkpoint.random_states import random_states
from speed_async.learner.checkpoint.store import checkpoint_folder, prune
from speed_async.learner.micro_batches import MicroBatches
from speed_async.learner.minibatches import split_groups
from speed_async.learner.model import compile_layers, context_length, embedding_table
from speed_async.learner.model_weights import ModelWeights
from speed_async.learner.optimizer import learning_rate, make_optimizer, set_lr
from speed_async.learner.optimizer_update import (
    Metrics,
    UpdateResult,
    combine,
    non_finite,
    update_parameters,
)
from speed_async.learner.parallel.ranks import ONE_RANK, Ranks
from speed_async.learner.placement import Placement
from speed_async.learner.policy import Policy
from speed_async.learner.progress import Progress
from speed_async.learner.reference import Reference, load_reference
from speed_async.learner.rows import TrainingRow, reweighted, training_rows
from speed_async.types import Group
from speed_async.weight_sync.canary_check import Canary


class Trainer:
    """Owns the policy and the optimiser. On a CPU, updates are bitwise deterministic.

    With several learner ranks, each has a trainer with a part of every parameter. `update`,
    `canary`, `whole` and `restore` are then collective: all ranks call them in the same order, with
    equal arguments. Only rank 0 calls `capture`, `write` and `save`; the others call
    `capture_training` and `write_training`.
    """

    def __init__(
        self,
        *,
        config: Config,
        model: PreTrainedModel,
        objective: Objective | None = None,
        run_id: str = "",
        ranks: Ranks = ONE_RANK,
    ) -> None:
        """`model` is a result of `load_for_rank`; with several ranks, it is sharded, and with
        adapters it is moved to `learner.device`. `objective` None builds the configured objective.
        `run_id` is stored in every checkpoint.

        Raises ModelError when the learner does not support the model.
        """
        self.model = model
        add_adapters(model, config.learner, seed=config.run.seed)
        self.num_updates = 0
        """Number of `update` calls, also skipped ones: the policy version."""
        self.num_optimizer_updates = 0
        self.num_skipped = 0
        """Optimiser updates skipped because a value was not finite."""
        self._run_id = run_id
        self._ranks = ranks
        self._punishes_length = config.objective.overlong_share > 0
        self._config = config.learner
        self._seed = config.run.seed
        self._total_updates = config.run.updates
        self._checkpoints = Path(config.run.folder) / "checkpoints"
        self.best = BestCheckpoints(self._checkpoints)
        source = model_folder(config.model.path)
        self._model_files, self._dtypes = read_model_files(source), read_dtypes(source)
        context = context_length(model, config.model.context_length)
        self._objective = objective or make_objective(config, context_length=context)
        self._policy = Policy(
            model,
            temperature=config.actors.temperature,
            entropy_gradient=config.objective.entropy_coefficient > 0,
        )
        placement = Placement.of(config, model, dtypes=self._dtypes, ranks=ranks)
        self._micro_batches = MicroBatches(
            self._policy,
            config.learner,
            context_length=context,
            ranks=ranks,
            device=placement.device,
        )
        self._canary_probe = CanaryProbe(
            model,
            max_context=config.model.context_length,
            seed=config.run.seed,
            device=placement.device,
        )
        if config.learner.compile:
            compile_layers(model)
        placement.place(self._policy)
        self._reference = None
        if config.objective.kl_coefficient > 0:
            reference, scope = self._policy, partial(without_adapters, model)
            if not has_adapters(model):
                reference = load_reference(config, ranks)
                placement.place(reference)
            self._reference = Reference(reference, self._micro_batches, scope=scope)
        self._optimizer = make_optimizer(model, config.learner)
        self._weights = ModelWeights(model)

    def update(
        self, groups: Sequence[Group], before_step: Callable[[], None] = lambda: None
    ) -> UpdateResult:
        """Trains on all groups, in `learner.passes` passes of `learner.minibatches` optimiser
        updates. An optimiser update whose loss or gradient is not finite is skipped; all are
        skipped when a reward or a behaviour log-probability is not finite.

        Completions with zero advantage and dropped screening samples count in the denominators of
        the aggregation. They have no gradient and are not computed. Raises ModelError for token ids
        outside the vocabulary of the model, and ValueError for too few completions or groups for
        the advantage, an empty prompt, or fewer groups than mini-batches.

        `before_step` is called before each step of the optimiser, the only place where weights
        change.
        """
        if not groups:
            raise ValueError("an update needs at least one group")
        check_token_ids(groups, num_token_ids=embedding_table(self.model).shape[0])
        lr = learning_rate(self._config, self.num_updates, total_updates=self._total_updates)
        metrics = batch_metrics(groups) | {"lr": lr}
        num_planned = num_skipped = self._config.optimizer_updates_per_batch
        reason = "" if inputs_finite(groups) else "a reward or behaviour log-probability"
        if not reason:
            set_lr(self._optimizer, lr)
            signals = compute_signals(self._objective, groups, self._kl_of_reward(groups))
            updates = self._train(groups, signals, before_step)
            metrics |= screening_metrics(groups, signals) | combine(updates)
            if self._punishes_length:
                metrics |= shaping_metrics(signals)
            failures = [names for each in updates if (names := non_finite(each))]
            num_skipped = len(failures)
            reason = failures[0] if failures else ""
        if 0 < num_skipped < num_planned:
            reason += f" in {num_skipped} of {num_planned} optimiser updates"
        self.num_updates += 1
        self.num_skipped += num_skipped
        self.num_optimizer_updates += num_planned - num_skipped
        metrics["skipped_updates"] = float(self.num_skipped)
        metrics["optimizer_updates"] = float(self.num_optimizer_updates)
        return UpdateResult(
            optimizer_updates=num_planned - num_skipped,
            num_skipped=num_skipped,
            skip_reason=f"not finite: {reason}" if reason else "",
            tokens=sum(group.num_tokens for group in groups),
            completions=sum(len(group.completions) for group in groups),
            metrics={key: value for key, value in metrics.items() if math.isfinite(value)},
        )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights to broadcast. As `ModelWeights.named`; `whole` has their values."""
        return self._weights.named()

    def whole(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        return self._weights.whole(names)

    def canary(self) -> Canary:
        """Canary of the current weights, which receivers verify. Runs one short forward pass.
        Raises ModelError when the weights have diverged."""
        return self._canary_probe.measure(self._policy)

    @property
    def policies(self) -> list[Policy]:
        """All policies whose forward passes an update makes."""
        return [self._policy, *([self._reference.policy] if self._reference is not None else [])]

    def check_save(self) -> None:
        """Checks before training that a checkpoint can be saved, without writing tensors.

        Raises SpeedAsyncError with the cause and the remedy.
        """
        folder = checkpoint_folder(self._checkpoints, self.num_updates)
        check_can_save(folder, model=self.model, model_files=self._model_files, dtypes=self._dtypes)

    def save(self, progress: Progress) -> int:
        """Writes a checkpoint of the current state, then prunes. Returns as `prune`.

        Raises OSError; all older checkpoints are then unchanged.
        """
        self.write(progress, self.capture(copy=False))
        return self.prune()

    def capture(self, *, copy: bool = True) -> Captured:
        """The current state, for `write`. With `copy`, updates may follow before it is written."""
        if self._ranks.size > 1 or has_adapters(self.model):
            model = self._weights.state(self.whole, self._dtypes.of)
        else:
            model = capture_model(self.model, self._dtypes, copy=copy)
        training = self.capture_training(copy=copy)
        return Captured(model=model, training=training, random=random_states())

    def capture_training(self, *, copy: bool = True) -> TrainingTensors:
        """The part of `capture` that this rank writes."""
        mesh = self._ranks.mesh
        return capture_training(self.model, self._optimizer, self._dtypes, mesh, copy=copy)

    def write(self, progress: Progress, captured: Captured) -> None:
        """Writes a checkpoint, also in another thread than the updates. Raises as `save`."""
        progress = replace(progress, run_id=self._run_id)
        save_checkpoint(
            checkpoint_folder(self._checkpoints, progress.policy_version),
            model=self.model,
            captured=captured,
            model_files=self._model_files,
            dtypes=self._dtypes,
            progress=progress,
            save_training=lambda folder: self.write_training(folder, captured.training),
        )

    def write_training(self, folder: Path, captured: TrainingTensors) -> None:
        """Writes the training state of this rank. Raises OSError."""
        write_training(folder, captured, self._ranks.mesh)

    def prune(self) -> int:
        """Removes all checkpoints but the newest `learner.keep_last` and those in `best.kept`.
        Returns the oldest version that can be resumed."""
        return prune(self._checkpoints, self._config.keep_last, self.best.kept)

    def restore(self, folder: Path, *, is_whole: bool = False) -> Progress:
        """Restores the state written by `save`; `is_whole` as for `load_checkpoint`.

        Raises ModelError.
        """
        progress = load_checkpoint(
            folder, model=self.model, optimizer=self._optimizer, is_whole=is_whole
        )
        self.num_updates = progress.policy_version
        self.num_optimizer_updates = progress.optimizer_updates
        self.num_skipped = progress.num_skipped
        return progress

    def _train(
        self,
        groups: Sequence[Group],
        signals: Sequence[GroupSignal],
        before_step: Callable[[], None],
    ) -> list[Metrics]:
        """All optimiser updates of the batch. Returns the metrics of each."""
        rows = training_rows(
            groups, signals, with_zero_advantage=self._objective.regularization.has_loss
        )
        if self._reference is not None:
            rows = self._reference.score(rows)
        if self._objective.has_fixed_proximal and self._config.optimizer_updates_per_batch > 1:
            rows = self._micro_batches.with_proximal(self._policy, rows)
        lengths = completion_lengths(groups)
        updates = []
        for index in range(self._config.passes):
            seed = (self._seed, self.num_updates, index)
            for part in split_groups(len(groups), self._config.minibatches, seed=seed):
                minibatch = [rows[i] for i in part]
                if self._config.minibatches > 1:  # otherwise the rows have these weights already
                    weights = self._objective.aggregation([lengths[i] for i in part])
                    minibatch = [reweighted(*pair) for pair in zip(minibatch, weights, strict=True)]
                updates.append(self._update_parameters(minibatch, before_step))
        return updates

    def _kl_of_reward(self, groups: Sequence[Group]) -> list[NDArray[np.float64]] | None:
        """Sums of k1 (N,) of each group, if the reward has a KL divergence."""
        if self._reference is None or not self._objective.regularization.kl_in_reward:
            return None
        return self._reference.sequence_k1(self._policy, groups)

    def _update_parameters(
        self, rows: Sequence[TrainingRow], before_step: Callable[[], None]
    ) -> Metrics:
        return update_parameters(
            self._policy,
            self._optimizer,
            self._objective,
            self._micro_batches.of(rows, policy_version=self.num_updates),
            grad_clip=self._config.grad_clip,
            ranks=self._ranks,
            before_step=before_step,
        )
