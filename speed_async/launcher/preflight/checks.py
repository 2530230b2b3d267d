"""Runs all checks that do not require loading the model. Writes nothing."""

from collections.abc import Sequence

from speed_async.config.schema import Config
from speed_async.errors import ConfigError, SpeedAsyncError
from speed_async.launcher.gpus import num_local_learners
from speed_async.launcher.preflight.devices import check_devices
from speed_async.launcher.preflight.findings import Findings, PreflightError
from speed_async.launcher.preflight.machine import (
    check_disk,
    check_folders,
    check_keys,
    check_libraries,
    check_ports,
)
from speed_async.launcher.preflight.memory import checkpoint_bytes, estimate_memory
from speed_async.launcher.preflight.model import CheckedModel, check_model, find_model
from speed_async.launcher.preflight.prompts import TRAINING, check_prompts, describe
from speed_async.launcher.preflight.shared_gpu import check_shared_gpus
from speed_async.launcher.preflight.suites import check_suites
from speed_async.launcher.preflight.task import CheckedTask, check_task
from speed_async.launcher.preflight.tokenizer import PromptTokenizer, check_tokenizer
from speed_async.launcher.rank import Rank
from speed_async.types import Prompt

MAX_SHOWN_TOKENS = 200


def run_checks(
    config: Config,
    errors: list[ConfigError] | None = None,
    *,
    resume: bool = False,
    actors_here: bool = True,
    first_rank: int = 0,
    num_local_ranks: int | None = None,
) -> Findings:
    """Run all checks. `errors`: errors already found in the configuration. `actors_here`: False
    if all actors may run on other machines. `first_rank`: the first rank of this node; the
    service runs beside rank 0. `num_local_ranks`: ranks of this node; None: all of the run."""
    findings, leads = Findings(errors=list(errors or ())), first_rank == 0
    num_local_ranks = num_local_ranks or config.cluster.learners + config.cluster.actors
    rank = Rank(
        rank=first_rank,
        local_rank=0,
        world_size=first_rank + num_local_ranks,  # at least
        local_world_size=num_local_ranks,
    )
    num_learners = num_local_learners(config, rank)
    check_devices(config, findings, actors_here=actors_here, num_learners=num_learners)
    check_libraries(config, findings)
    if leads:
        check_keys(config, findings)
        check_ports(config, findings, resume=resume)
    parent = check_folders(config, findings)
    folder = find_model(config, findings)
    model = None if folder is None else check_model(config, folder, findings)
    tokenizer = None if folder is None else check_tokenizer(config, folder, findings)
    task = check_task(config, findings)
    suites = check_suites(config, findings)
    parts = [(f"'{name}' suite", prompts) for name, prompts in suites.items()]
    if task is not None:
        prompts = (len(task.task.train_prompts), len(task.task.held_out_prompts))
        counts = "{:,} training prompts, {:,} held-out prompts".format(*prompts)
        findings.show("task", [f"{config.task.name}: {counts}"])
        _show_example(task, tokenizer, findings)
        own = [(TRAINING, task.task.train_prompts), ("held-out", task.task.held_out_prompts)]
        parts = [*own, *parts]
    if tokenizer is not None and model is not None and parts:
        _check_lengths(config, model, tokenizer, parts, findings)
    if model is not None and model.weights is not None:
        memory = estimate_memory(config, model, findings, rank=rank)
        memory += check_shared_gpus(config, model.facts, model.weights, findings, rank=rank)
        findings.show("memory", memory)
        if parent is not None and leads:
            disk = check_disk(
                config,
                findings,
                parent=parent,
                checkpoint_bytes=checkpoint_bytes(config, model, model.weights),
            )
            findings.show("disk", disk)
    return findings


def require_runnable(config: Config, rank: Rank, *, resume: bool = False) -> list[str]:
    """Run all checks and return the warnings. Raises SpeedAsyncError with all errors."""
    findings = run_checks(
        config,
        resume=resume,
        actors_here=not rank.has_many_nodes,
        num_local_ranks=rank.local_world_size,
    )
    if findings.errors:
        raise combine_errors(findings.errors)
    return findings.warnings


def combine_errors(errors: list[SpeedAsyncError]) -> SpeedAsyncError:
    return errors[0] if len(errors) == 1 else PreflightError(errors)


def _check_lengths(
    config: Config,
    model: CheckedModel,
    tokenizer: PromptTokenizer,
    parts: Sequence[tuple[str, Sequence[Prompt]]],
    findings: Findings,
) -> None:
    measured = check_prompts(config, model, tokenizer, parts, findings)
    context = model.context_length or "of unknown length"
    limits = f"context {context}, actors.max_new_tokens {config.actors.max_new_tokens}"
    findings.show("prompt lengths", [*map(describe, measured), limits])


def _show_example(task: CheckedTask, tokenizer: PromptTokenizer | None, findings: Findings) -> None:
    prompt = task.example
    lines = [f"text: {prompt.text!r}"]
    if tokenizer is not None:
        try:
            [ids] = tokenizer.encode([prompt.text])
        except Exception as error:  # a template may raise anything; _check_lengths counts it
            lines.append(f"cannot be encoded: {error}")
        else:
            pieces = " ".join(map(repr, tokenizer.pieces(ids[:MAX_SHOWN_TOKENS])))
            more = " ..." if len(ids) > MAX_SHOWN_TOKENS else ""
            lines.append(f"{len(ids)} tokens: {pieces}{more}")
            shown = " ".join(map(str, ids[:MAX_SHOWN_TOKENS]))
            lines.append(f"token ids: {shown}{more}")
    findings.show("first prompt", lines)
    if task.scores is not None:
        right, empty = task.scores
        answer = f"the reference answer {prompt.answer!r} scores {right:g}"
        findings.show("verifier", [answer, f"an empty completion scores {empty:g}"])
