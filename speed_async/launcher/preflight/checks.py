"""All that can be known before a model is loaded: every check, in one call. Writes nothing."""

from speed_async.config.schema import Config
from speed_async.errors import ConfigError, SpeedAsyncError
from speed_async.launcher.preflight.devices import check_devices
from speed_async.launcher.preflight.findings import Findings, PreflightError
from speed_async.launcher.preflight.machine import (
    check_disk,
    check_folders,
    check_keys,
    check_libraries,
    check_ports,
)
from speed_async.launcher.preflight.memory import CHECKPOINT_BYTES, estimate_memory
from speed_async.launcher.preflight.model import CheckedModel, check_model
from speed_async.launcher.preflight.prompts import check_prompts, describe
from speed_async.launcher.preflight.task import CheckedTask, check_task
from speed_async.launcher.preflight.tokenizer import PromptTokenizer, check_tokenizer

MAX_SHOWN_TOKENS = 200


def find_all(
    config: Config,
    errors: list[ConfigError] | None = None,
    *,
    resume: bool = False,
    actors_here: bool = True,
    leads: bool = True,
) -> Findings:
    """`errors` are those that the configuration has already. `actors_here` is False where other
    machines may run all actors; `leads`, where another one has the learner and the service."""
    findings = Findings(errors=list(errors or ()))
    check_devices(config, findings, actors_here=actors_here)
    check_libraries(config, findings)
    if leads:
        check_keys(config, findings)
        check_ports(config, findings, resume=resume)
    parent = check_folders(config, findings)
    model = check_model(config, findings)
    tokenizer = check_tokenizer(config, findings)
    task = check_task(config, findings)
    if task is not None:
        _show_example(task, tokenizer, findings)
        if tokenizer is not None and model is not None:
            _check_lengths(config, model, tokenizer, task, findings)
    if model is not None and model.weights is not None:
        checkpoint_bytes = CHECKPOINT_BYTES * model.weights.num_parameters
        findings.show("memory", estimate_memory(config, model, findings))
        if parent is not None and leads:
            disk = check_disk(config, findings, parent=parent, checkpoint_bytes=checkpoint_bytes)
            findings.show("disk", disk)
    return findings


def refuse_what_cannot_run(
    config: Config, *, resume: bool = False, actors_here: bool = True
) -> list[str]:
    """Warnings, when nothing is wrong. Raises SpeedAsyncError with all that is."""
    findings = find_all(config, resume=resume, actors_here=actors_here)
    if findings.errors:
        raise as_one(findings.errors)
    return findings.warnings


def as_one(errors: list[SpeedAsyncError]) -> SpeedAsyncError:
    return errors[0] if len(errors) == 1 else PreflightError(errors)


def _check_lengths(
    config: Config,
    model: CheckedModel,
    tokenizer: PromptTokenizer,
    task: CheckedTask,
    findings: Findings,
) -> None:
    parts = [("training", task.task.train_prompts), ("held-out", task.task.held_out_prompts)]
    measured = check_prompts(config, model, tokenizer, parts, findings)
    context = model.context_length or "of unknown length"
    room = f"context {context}, actors.max_new_tokens {config.actors.max_new_tokens}"
    findings.show("prompt lengths", [*map(describe, measured), room])


def _show_example(task: CheckedTask, tokenizer: PromptTokenizer | None, findings: Findings) -> None:
    prompt = task.example
    lines = [f"text: {prompt.text!r}"]
    if tokenizer is not None:
        try:
            [ids] = tokenizer.encode([prompt.text])
        except Exception as error:  # a template may fail on it in any way; counted by lengths
            lines.append(f"it cannot be encoded: {error}")
        else:
            pieces = " ".join(map(repr, tokenizer.pieces(ids[:MAX_SHOWN_TOKENS])))
            more = " ..." if len(ids) > MAX_SHOWN_TOKENS else ""
            lines.append(f"{len(ids)} tokens: {pieces}{more}")
            shown = " ".join(map(str, ids[:MAX_SHOWN_TOKENS]))
            lines.append(f"token ids: {shown}{more}")
    findings.show("first prompt", lines)
    if task.scores is not None:
        right, empty = task.scores
        answer = f"its reference answer {prompt.answer!r} scores {right:g}"
        findings.show("verifier", [answer, f"an empty completion scores {empty:g}"])
