"""Checks of the task: its data, and that its verifier tells a right answer from none."""

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
UNSCORABLE = frozenset({"scripted"})
"""Tasks whose prompts have no answer that passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedTask:
    task: Task
    example: Prompt
    scores: list[float] | None
    """Of the example's own answer, and of nothing; None where that says nothing."""


def check_task(config: Config, findings: Findings) -> CheckedTask | None:
    """None when there are no prompts."""
    if any(getattr(error, "field", "").startswith("task.") for error in findings.errors):
        return None
    try:
        task = make_task(config.task)
        examples = list(task.train_prompts[:NUM_EXAMPLES])
        _ = len(task.held_out_prompts)  # some are made when they are asked for
    except SpeedAsyncError as error:
        findings.errors.append(error)
        return None
    scores = None
    if config.task.name not in UNSCORABLE:
        scores = _check_verifier(config, task, examples, findings)
    return CheckedTask(task=task, example=examples[0], scores=scores)


def _check_verifier(
    config: Config, task: Task, examples: list[Prompt], findings: Findings
) -> list[float] | None:
    """Scores of the first example; every example is scored, and errors are noted."""
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
                f"task.name = {config.task.name!r}: the verifier refuses the reference answer of "
                f"each of the first {len(examples)} prompts (such as {examples[0].answer!r}), so "
                "nothing could be learned; correct the answers, or task.match"
            )
        )
    paid = [prompt for prompt, reply in zip(examples, replies, strict=True) if reply[1] > 0]
    if paid:
        findings.errors.append(
            TaskError(
                f"task.name = {config.task.name!r}: the verifier pays {replies[0][1]:g} for an "
                f"empty completion to training prompt {paid[0].prompt_id} (answer "
                f"{paid[0].answer!r}), which a policy would learn to give; correct that answer"
            )
        )
    return replies[0]


def _score(task: Task, prompt: Prompt, completions: list[str], timeout_s: float) -> Reply:
    """In a thread that is left behind when the verifier hangs."""
    replies: list[Reply] = []
    scoring = threading.Thread(
        target=lambda: replies.append(score_all(task, prompt, completions)), daemon=True
    )
    scoring.start()
    scoring.join(timeout_s)
    return replies[0] if replies else f"gave no answer within {timeout_s:g} s"
