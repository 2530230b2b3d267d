"""Checks of the model folder: config.json, weights, context length and kinds of attention."""

from dataclasses import dataclass
from pathlib import Path

from speed_async.config.model_facts import ModelInfo, read_model_info
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, ModelError
from speed_async.launcher.preflight.findings import Findings
from speed_async.launcher.preflight.weights import Weights, read_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedModel:
    facts: ModelInfo
    weights: Weights | None
    context_length: int | None
    """That the run uses; None when only the model's class knows."""


def check_model(config: Config, findings: Findings) -> CheckedModel | None:
    """None when there is no model to say more about."""
    folder = Path(config.model.path)
    if not (folder / "config.json").is_file():
        return None  # said by config/checks.py
    weights, errors = read_weights(folder)
    findings.errors += errors
    try:
        facts = read_model_info(folder)
    except ModelError as error:
        findings.errors.append(error)
        return None
    context = _context(config, facts, findings)
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
                f"the model in {config.model.path} holds {limit} tokens; set at most {limit}",
            )
        )
        return limit
    context = wanted or limit
    most = config.actors.max_new_tokens
    if wanted is None and context is not None and most >= context:
        findings.errors.append(
            ConfigError(
                "actors.max_new_tokens",
                most,
                f"leaves no room for a prompt in the model's context of {context} tokens; set "
                f"less than {context} minus the tokens of the longest prompt",
            )
        )
    return context


def _check_attention(
    config: Config, facts: ModelInfo, context: int | None, findings: Findings
) -> None:
    """The torch engine attends fully; it refuses other models, late."""
    window = facts.sliding_window
    if window is not None and (context is None or window < context):
        findings.errors.append(
            ConfigError(
                "actors.engine",
                "torch",
                f"the model in {config.model.path} attends over a window of {window} tokens and "
                f"this engine over all: set model.context_length to at most {window}, or 'vllm'",
            )
        )
    others = sorted(facts.layer_types - {"full_attention", "sliding_attention"})
    if others:
        findings.errors.append(
            ConfigError(
                "actors.engine",
                "torch",
                f"the model in {config.model.path} has layers of kind {', '.join(others)}, which "
                "this engine cannot serve; set 'vllm'",
            )
        )
