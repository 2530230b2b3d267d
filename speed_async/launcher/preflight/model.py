"""Checks of the model folder: config.json, weights, context length and attention types."""

from dataclasses import dataclass
from pathlib import Path

from speed_async.config.local_model import model_folder
from speed_async.config.model_facts import ModelInfo, read_json, read_model_info
from speed_async.config.model_family import family_faults, routing_notice
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, ModelError
from speed_async.launcher.preflight.findings import Findings
from speed_async.launcher.preflight.tensors import tensor_faults
from speed_async.launcher.preflight.weights import Weights, read_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedModel:
    facts: ModelInfo
    weights: Weights | None
    context_length: int | None
    """Context length of the run; None if only the model's class defines it."""


def find_model(config: Config, findings: Findings) -> Path | None:
    """The model folder. Returns None if it is a model of the hub that cannot be found."""
    try:
        folder = model_folder(config.model.path)
    except ConfigError as error:
        findings.errors.append(error)
        return None
    if str(folder) != config.model.path:
        findings.show("model", [f"{config.model.path}: {folder}"])
    return folder


def check_model(config: Config, folder: Path, findings: Findings) -> CheckedModel | None:
    """Check the model folder. Returns None if its config.json cannot be read."""
    if not (folder / "config.json").is_file():
        return None  # reported by config/checks/combinations.py
    weights, errors = read_weights(folder)
    findings.errors += errors
    try:
        facts = read_model_info(folder)
    except ModelError as error:
        findings.errors.append(error)
        return None
    context = _context(config, facts, findings)
    for fault in family_faults(facts.record, context):
        findings.errors.append(ConfigError("model.path", config.model.path, fault))
    if weights is not None:
        record, num_learners = read_json(folder / "config.json"), config.cluster.learners
        for fault in tensor_faults(record, weights, num_learners=num_learners):
            findings.errors.append(ConfigError("model.path", config.model.path, fault))
    if notice := routing_notice(facts.record):
        findings.show("routing", [notice])
    if config.actors.engine == "torch":
        _check_attention(config, facts, context, findings)
    return CheckedModel(facts=facts, weights=weights, context_length=context)


def _context(config: Config, facts: ModelInfo, findings: Findings) -> int | None:
    wanted, limit = config.model.context_length, facts.context_length
    if wanted is not None and limit is not None and wanted > limit:
        findings.errors.append(
            ConfigError(
                "model.context_length",
                wanted,
                f"the model in {config.model.path} supports {limit} tokens; set at most {limit}",
            )
        )
        return limit
    context = wanted or limit
    max_new_tokens = config.actors.max_new_tokens
    if wanted is None and context is not None and max_new_tokens >= context:
        findings.errors.append(
            ConfigError(
                "actors.max_new_tokens",
                max_new_tokens,
                f"leaves no space for a prompt in the model's context of {context} tokens; set "
                f"less than {context} minus the tokens of the longest prompt",
            )
        )
    return context


def _check_attention(
    config: Config, facts: ModelInfo, context: int | None, findings: Findings
) -> None:
    """Check that the model uses full attention only; the torch engine supports no other type."""
    window = facts.sliding_window
    if window is not None and (context is None or window < context):
        findings.errors.append(
            ConfigError(
                "actors.engine",
                "torch",
                f"the model in {config.model.path} uses a sliding window of {window} tokens, and "
                "this engine supports full attention only: set model.context_length to at most "
                f"{window}, or use 'vllm'",
            )
        )
    others = sorted(facts.layer_types - {"full_attention", "sliding_attention"})
    if others:
        findings.errors.append(
            ConfigError(
                "actors.engine",
                "torch",
                f"the model in {config.model.path} has layers of type {', '.join(others)}, which "
                "this engine does not support; use 'vllm'",
            )
        )
