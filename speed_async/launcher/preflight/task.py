"""Checks of the task: its data, and that its verifier distinguishes right from empty answers."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from speed_async.config.schema import Config
from speed_async.environments.registry import make_task
from speed_async.environments.rewards import Rewards, unscored
from speed_async.environments.task import StoredTask, Task
from speed_async.errors import SpeedAsyncError, TaskError
from speed_async.launcher.preflight.findings import Findings
from speed_async.types import Prompt, Verdict

NUM_EXAMPLES = 3
WITHOUT_ANSWERS = frozenset({"scripted"})
"""Tasks whose prompts have no passing answer."""
FORMATTED = "verifiers:"
"""Tasks that may want more of a completion than the answer, such as tags."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedTask:
    task: Task
    example: Prompt
    scores: list[float] | None
    """Scores of the example's reference answer and of an empty completion; None if not checked."""


def check_task(config: Config, findings: Findings) -> CheckedTask | None:
    """Check the task. Returns None if there are no prompts."""
    if any(getattr(error, "field", "").startswith("task.") for error in findings.errors):
        return None
    try:
        task = make_task(config.task)
        examples = list(task.train_prompts[:NUM_EXAMPLES])
        _ = len(task.held_out_prompts)  # some tasks generate them on first access
    except SpeedAsyncError as error:
        findings.errors.append(error)
        return None
    if isinstance(task, StoredTask):
        findings.show("data", list(task.notes))
        findings.warnings += task.warnings
    scores = None
    if config.task.name not in WITHOUT_ANSWERS:
        scores = _check_verifier(config, task, examples, findings)
    return CheckedTask(task=task, example=examples[0], scores=scores)


def _check_verifier(
    config: Config, task: Task, examples: list[Prompt], findings: Findings
) -> list[float] | None:
    """Score every example and report errors. Returns the scores of the first example."""
    try:
        rewards = Rewards(task, config.task.weighted_rewards)
        getattr(task, "warm_up", lambda: None)()
    except SpeedAsyncError as error:
        findings.errors.append(error)
        return None
    timeout_s = config.actors.verifier_timeout_s
    replies: list[list[Verdict]] = []
    for prompt in examples:
        reply = _score(rewards, prompt, [prompt.answer, ""], timeout_s)
        for verdict in reply:
            if verdict.outcome != "scored":
                text = f"the verifier of training prompt {prompt.prompt_id} {verdict.error}"
                findings.errors.append(TaskError(f"task.name = {config.task.name!r}: {text}"))
                return None
        replies.append(reply)
    is_own = [each.name for each in config.task.weighted_rewards] == ["correct"]
    if is_own and not config.task.name.startswith(FORMATTED):
        findings.errors += _wrong_rewards(config.task.name, examples, replies)
    return [verdict.reward for verdict in replies[0]]


def _wrong_rewards(
    name: str, examples: list[Prompt], replies: list[list[Verdict]]
) -> Iterator[TaskError]:
    """Errors about the task's own scores of reference answers and of empty completions."""
    answerable = [
        reply for prompt, reply in zip(examples, replies, strict=True) if prompt.answer.strip()
    ]
    if answerable and not any(right.reward for right, _ in answerable):
        yield TaskError(
            f"task.name = {name!r}: the verifier rejects the reference answer of each of the first "
            f"{len(examples)} prompts (such as {examples[0].answer!r}), so nothing could be "
            "learned; correct the answers, or task.match"
        )
    for prompt, (_, empty) in zip(examples, replies, strict=True):
        if empty.reward > 0:
            yield TaskError(
                f"task.name = {name!r}: the verifier scores an empty completion {empty.reward:g} "
                f"for training prompt {prompt.prompt_id} (answer {prompt.answer!r}), which a "
                "policy would learn to exploit; correct that answer"
            )
            return


def _score(
    rewards: Rewards, prompt: Prompt, completions: list[str], timeout_s: float
) -> list[Verdict]:
    """Score in a daemon thread, which is abandoned if the verifier hangs."""
    replies: list[list[Verdict]] = []
    scoring = threading.Thread(
        target=lambda: replies.append(rewards.verdicts(prompt, completions)), daemon=True
    )
    scoring.start()
    scoring.join(timeout_s)
    late = unscored("timeout", f"returned no result within {timeout_s:g} s")
    return replies[0] if replies else [late]
