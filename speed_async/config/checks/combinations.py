"""Checks for invalid combinations of values, run before heavy imports."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from speed_async.config.checks.gate import check_gate
from speed_async.config.checks.task import check_format, check_task
from speed_async.config.checks.update import check_update
from speed_async.config.checks.vllm import check_vllm
from speed_async.config.hub_id import is_hub_id
from speed_async.config.key_folder import check_client_files
from speed_async.config.schema import Config
from speed_async.config.sections.evaluate import HELD_OUT
from speed_async.config.sections.sources import PROMPT_FORMAT
from speed_async.errors import ConfigError, NotAvailableHere

INCARNATIONS_PER_ATTEMPT = 1000
"""The first incarnation of a rank is the attempt number times this value, so actor names are unique
across attempts of a run. Incarnations of an actor without a rank start at 0."""
MODEL_FOLDER = "set a Hugging Face folder (saved with save_pretrained, or a complete download)"
RESERVED_ARGUMENTS = frozenset(
    {"conversation", "messages", "tools", "documents", "chat_template", "tokenizer_kwargs"}
    | {"add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation"}
    | {"max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
)
"""Parameters of transformers' `apply_chat_template`, and variables that it sets itself."""
BYTES_PER_TOKEN = 12
"""Token id, log-probability and policy version: four bytes each."""


def check_combinations(config: Config) -> list[ConfigError]:
    """Return an error for every invalid combination."""
    checks = (
        check_gate,
        _check_objective,
        check_update,
        _check_buffer,
        _check_lengths,
        _check_chat,
        _check_roles,
        check_vllm,
        check_task,
        _check_suites,
        _check_files,
        _check_security,
    )
    return [error for check in checks for error in check(config)]


def _check_objective(config: Config) -> Iterator[ConfigError]:
    objective = config.objective
    low, high = objective.min_ratio, objective.max_ratio
    if low is not None and high is not None and low >= high:
        yield ConfigError("objective.min_ratio", low, f"must be below objective.max_ratio = {high}")
    if objective.screening_samples != "all" and config.gate.mode == "off":
        yield ConfigError(
            "objective.screening_samples",
            objective.screening_samples,
            "there are no screening samples with gate.mode = 'off'; set 'all'",
        )
    if objective.screening_samples == "none" and config.gate.mode == "filter":
        yield ConfigError(
            "objective.screening_samples",
            "none",
            "with gate.mode = 'filter' every sample is a screening sample, so training "
            "would use none; set 'unbiased' or 'all'",
        )


def _check_buffer(config: Config) -> Iterator[ConfigError]:
    batch = config.learner.groups_per_update
    if config.max_credits < batch:
        yield ConfigError(
            "buffer.credits",
            config.max_credits,
            f"fewer credits than learner.groups_per_update = {batch}: no batch would be complete; "
            f"set at least {batch}",
        )
    if config.capacity_groups < batch:
        yield ConfigError(
            "buffer.capacity_groups",
            config.capacity_groups,
            f"smaller than learner.groups_per_update = {batch}: no batch would be complete; "
            f"set at least {batch}",
        )
    group_bytes = config.gate.group_size * config.actors.max_new_tokens * BYTES_PER_TOKEN
    if group_bytes * batch > config.buffer.capacity_bytes:
        yield ConfigError(
            "buffer.capacity_bytes",
            config.buffer.capacity_bytes,
            f"a group of {config.gate.group_size} completions of actors.max_new_tokens = "
            f"{config.actors.max_new_tokens} takes {group_bytes} bytes and a batch has {batch} "
            f"groups; set at least {group_bytes * batch}",
        )


def _check_lengths(config: Config) -> Iterator[ConfigError]:
    context = config.model.context_length
    if context is not None and config.actors.max_new_tokens >= context:
        yield ConfigError(
            "actors.max_new_tokens",
            config.actors.max_new_tokens,
            f"leaves no space for a prompt in model.context_length = {context}",
        )


def _check_chat(config: Config) -> Iterator[ConfigError]:
    model = config.model
    if PROMPT_FORMAT in (model.system_prompt or ""):
        yield ConfigError(
            "model.system_prompt",
            model.system_prompt,
            f"{PROMPT_FORMAT} is not replaced here; the prompt follows as a message of its own. "
            "Remove it",
        )
    for name in sorted(RESERVED_ARGUMENTS.intersection(model.template_arguments)):
        yield ConfigError(
            f"model.template_arguments.{name}",
            model.template_arguments[name],
            "is set by this program; remove it",
        )


def _check_roles(config: Config) -> Iterator[ConfigError]:
    if config.learner.cpu_offload and config.cluster.learners == 1:
        yield ConfigError(
            "learner.cpu_offload",
            True,
            "only sharded parameters can be offloaded; set cluster.learners to 2 or more",
        )
    if config.learner.compile and config.cluster.learners > 1:
        yield ConfigError(
            "learner.compile",
            True,
            "sharded layers were not tested with torch.compile; remove it, or set "
            "cluster.learners to 1",
        )
    if config.learner.compile and config.learner.activation_checkpointing == "selective":
        yield ConfigError(
            "learner.activation_checkpointing",
            "selective",
            "kernels of torch.compile hide the matrix products that it keeps; use full or none, or "
            "remove learner.compile",
        )
    if config.actors.max_restarts >= INCARNATIONS_PER_ATTEMPT:
        yield ConfigError(
            "actors.max_restarts",
            config.actors.max_restarts,
            f"an attempt of a run has {INCARNATIONS_PER_ATTEMPT} incarnations per rank; set at "
            f"most {INCARNATIONS_PER_ATTEMPT - 1}",
        )
    if config.actors.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        yield NotAvailableHere(
            "actors.engine",
            "vllm",
            "vLLM is not installed here: pip install 'speed_async[vllm]' (on a CPU: "
            "scripts/install_vllm_cpu.sh), or set 'torch'",
        )


def _check_suites(config: Config) -> Iterator[ConfigError]:
    names = [HELD_OUT]
    for suite in config.evaluate.suites:
        if suite.name in names:
            taken = "the task's own held-out prompts" if suite.name == HELD_OUT else "another suite"
            yield ConfigError(
                "evaluate.suites",
                suite.name,
                f"this name is that of {taken}; give each suite a name of its own",
            )
        names.append(suite.name)
        yield from check_format("evaluate.suites.format", suite.format)
        if not Path(suite.path).exists() and not is_hub_id(suite.path):
            yield NotAvailableHere(
                "evaluate.suites",
                suite.path,
                f"no such file or folder; set the path of the data of suite '{suite.name}', or "
                "create it with `speed-async data prepare`",
            )


def _check_files(config: Config) -> Iterator[ConfigError]:
    folder = Path(config.model.path)
    if not folder.is_dir():
        if not is_hub_id(config.model.path):  # config/local_model.py looks for it in the hub
            yield ConfigError("model.path", config.model.path, f"no such folder; {MODEL_FOLDER}")
    elif not (folder / "config.json").is_file():
        yield ConfigError(
            "model.path",
            config.model.path,
            f"the folder has no config.json; {MODEL_FOLDER}",
        )


def _check_security(config: Config) -> Iterator[ConfigError]:
    cluster = config.cluster
    if not cluster.uses_curve:
        return
    if cluster.keys is not None:
        try:
            check_client_files(Path(cluster.keys))
        except ConfigError as error:
            yield error
        return
    make = "create keys with `speed-async keys FOLDER` and set cluster.keys = 'FOLDER'"
    if cluster.security == "curve":
        yield ConfigError("cluster.keys", None, f"cluster.security = 'curve' needs keys; {make}")
        return
    yield ConfigError(
        "cluster.host",
        cluster.host,
        f"not a loopback address, and cluster.keys = None: {make}, or set cluster.security = "
        "'insecure' (no encryption, open to every client that reaches the address)",
    )
