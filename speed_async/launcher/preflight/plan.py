"""Describes what a run would do: roles by node, updates, completions per update, evaluations."""

from collections.abc import Iterator

from speed_async.config.schema import Config
from speed_async.launcher.rank import Node


def describe_run(config: Config, node: Node) -> list[str]:
    """Lines for the section `run` of `speed-async check` and `speed-async train --dry-run`."""
    return [
        _algorithm(config),
        *(_roles(config, node, index) for index in range(node.num_nodes)),
        _updates(config),
        *_evaluations(config),
        _checkpoints(config),
    ]


def _algorithm(config: Config) -> str:
    gate, objective = config.gate, config.objective
    group = f"{gate.n_init} + {gate.n_cont}" if gate.mode == "screen" else str(gate.group_size)
    return (
        f"algorithm: {config.algorithm} (gate.mode {gate.mode}, {group} completions per prompt; "
        f"advantage {objective.advantage}, policy_loss {objective.policy_loss}, correction "
        f"{objective.correction})"
    )


def _roles(config: Config, node: Node, index: int) -> str:
    first, last = index * node.num_ranks, (index + 1) * node.num_ranks - 1
    first_actor = max(first, config.cluster.learners)
    last_learner = min(last, config.cluster.learners - 1)
    roles = []
    if first <= last_learner:
        service = ", beside the buffer service" if index == 0 else ""
        alone = "the learner" if config.cluster.learners == 1 else "a learner"
        roles.append(_ranks(first, last_learner, alone, "learners") + service)
    if first_actor <= last:
        engine = f"engine {config.actors.engine}"
        if config.actors.weight_ranks > 1:
            engine += f", {config.actors.weight_ranks} GPUs each"
        roles.append(f"{_ranks(first_actor, last, 'an actor', 'actors')} ({engine})")
    return f"node {index}: {', '.join(roles)}"


def _ranks(first: int, last: int, one: str, several: str) -> str:
    return f"rank {first} is {one}" if first == last else f"ranks {first} to {last} are {several}"


def _updates(config: Config) -> str:
    num_updates, num_prompts = config.run.updates, config.learner.groups_per_update
    if num_updates == 0:
        return "updates: none; only the accuracy of the model is measured"
    group = config.gate.group_size
    steps = ""
    if (num_steps := config.learner.optimizer_updates_per_batch) > 1:
        steps = f"; {num_steps} optimizer updates each (learner.passes x learner.minibatches)"
    return (
        f"updates: {num_updates:,}, each of {num_prompts:,} prompts x {group} completions = "
        f"{num_prompts * group:,} completions of at most {config.actors.max_new_tokens:,} tokens; "
        f"{num_updates * num_prompts * group:,} completions in total{steps}"
    )


def _evaluations(config: Config) -> Iterator[str]:
    evaluate = config.evaluate
    yield _evaluation("held-out prompts", evaluate.every, evaluate.num_samples)
    for suite in evaluate.suites:
        yield _evaluation(suite.name, suite.every, suite.samples)


def _evaluation(name: str, every: int, num_samples: int) -> str:
    when = f"every {every:,} updates" if every else "at the start and at the end"
    plural = "s" if num_samples > 1 else ""
    return f"evaluation: {name} {when}, {num_samples} completion{plural} per prompt"


def _checkpoints(config: Config) -> str:
    every = config.learner.checkpoint_every
    when = f"every {every:,} updates" if every else "at the end"
    return f"checkpoints: {when}, in {config.run.folder}"
