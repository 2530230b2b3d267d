"""Checks for invalid combinations of the settings of an update: passes and objective."""

from collections.abc import Iterator

from speed_async.config.schema import Config
from speed_async.errors import ConfigError


def check_update(config: Config) -> Iterator[ConfigError]:
    learner, objective = config.learner, config.objective
    if learner.groups_per_update % learner.minibatches:
        yield ConfigError(
            "learner.minibatches",
            learner.minibatches,
            f"does not divide learner.groups_per_update = {learner.groups_per_update}, so "
            "mini-batches would differ in size; set a divisor",
        )
    if (
        learner.optimizer_updates_per_batch > 1
        and objective.policy_loss == "policy_gradient"
        and objective.correction == "none"
    ):
        yield ConfigError(
            "objective.correction",
            "none",
            f"a batch has {learner.optimizer_updates_per_batch} optimiser updates "
            "(learner.passes x learner.minibatches) and nothing corrects for the change of the "
            "policy between them; set objective.policy_loss = 'ppo_clip', or a correction such as "
            "'token_tis'",
        )
    if (
        objective.mask_truncated
        and config.task.truncated_reward
        and not config.task.score_truncated
    ):
        yield ConfigError(
            "objective.mask_truncated",
            True,
            f"truncated completions have no gradient to learn from task.truncated_reward = "
            f"{config.task.truncated_reward}; set one of the two to its default",
        )
    if objective.correction == "sequence_snis" and (
        objective.entropy_coefficient or (objective.kl_coefficient and objective.kl != "k1")
    ):
        yield ConfigError(
            "objective.correction",
            objective.correction,
            "divides the whole gradient by the mean weight, also that of the entropy "
            "(objective.entropy_coefficient) and of the KL divergence (objective.kl_coefficient); "
            "set 'sequence_tis', or the coefficients to 0",
        )
    num_updates = config.run.updates
    if learner.lr_schedule != "constant" and 0 < num_updates <= learner.warmup_updates:
        yield ConfigError(
            "learner.lr_schedule",
            learner.lr_schedule,
            f"the warm-up of learner.warmup_updates = {learner.warmup_updates} does not end before "
            f"run.updates = {num_updates}; lower it",
        )
