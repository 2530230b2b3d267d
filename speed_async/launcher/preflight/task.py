"""Checks of the task: its data, and that its verifier distinguishes right from empty answers."""

import threading
from dataclasses import dataclass

from speed_async.config.schema import Config
from speed_async.environments.registry import make_task
from speed_async.environments.task import Task
from speed_async.environments.verifier_worker import Reply, score_all
from speed_async.errors import SpeedAsyncError, TaskError
from speed_async.launcher.preflight.findings import Findings
from speed_async.types import Prompt

NUM_EXAMPLES = 3
WITHOUT_ANSWERS = frozenset({"scripted"})
"""Tasks whose prompts have no passing answer."""


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
    scores = None
    if config.task.name not in WITHOUT_ANSWERS:
        scores = _check_verifier(config, task, examples, findings)
    return CheckedTask(task=task, example=examples[0], scores=scores)


def _check_verifier(
    config: Config, task: Task, examples: list[Prompt], findings: Findings
) -> list[float] | None:
    """Score every example and report errors. Returns the scores of the first example."""
    timeout_s = config.actors.verifier_timeout_s
    replies: list[list[float]] = []
    for prompt in examples:
        reply = _score(task, prompt, [prompt.answer, ""], timeout_s)
        if isinstance(reply, str):
            text = f"the verifier of training prompt {prompt.prompt_id} {reply}"
            findings.errors.append(TaskError(f"task.name = {config.task.name!r}: {text}"))
            return None
        replies.append([verdict.reward for verdict in reply])
    answerable = [
        reply for prompt, reply in zip(examples, replies, strict=True) if prompt.answer.strip()
    ]
    if answerable and not any(right for right, _ in answerable):
        findings.errors.append(
            TaskError(
                f"task.name = {config.task.name!r}: the verifier rejects the reference answer of "
                f"each of the first {len(examples)} prompts (such as {examples[0].answer!r}), so "
                "nothing could be learned; correct the answers, or task.match"
            )
        )
    rewarded = [prompt for prompt, reply in zip(examples, replies, strict=True) if reply[1] > 0]
    if rewarded:
        findings.errors.append(
            TaskError(
                f"task.name = {config.task.name!r}: the verifier scores an empty completion "
                f"{replies[0][1]:g} for training prompt {rewarded[0].prompt_id} (answer "
                f"{rewarded[0].answer!r}), which a policy would learn to exploit; correct that "
                "answer"
            )
        )
    return replies[0]


def _score(task: Task, prompt: Prompt, completions: list[str], timeout_s: float) -> Reply:
    """Score in a daemon thread, which is abandoned if the verifier hangs."""
    replies: list[Reply] = []
    scoring = threading.Thread(
        target=lambda: replies.append(score_all(task, prompt, completions)), daemon=True
    )
    scoring.start()
    scoring.join(timeout_s)
    return replies[0] if replies else f"returned no result within {timeout_s:g} s"
