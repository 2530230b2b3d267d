"""Prompt lengths against the context: how many do not fit, why, and which is the first."""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from jinja2 import TemplateError

from speed_async.config.schema import Config
from speed_async.errors import ConfigError
from speed_async.launcher.preflight.findings import Findings
from speed_async.launcher.preflight.model import CheckedModel
from speed_async.launcher.preflight.tokenizer import PromptTokenizer
from speed_async.types import Prompt

BATCH = 1024
MAX_QUOTED = 40
MAX_CHARACTERS = 4_000_000
"""Past this many, a part's prompts are judged by a sample: some seconds of work."""
TOO_LONG, EMPTY, UNKNOWN_TOKEN, TEMPLATE = "too long", "empty", "unknown token", "template"
REMEDIES = {
    TOO_LONG: "give shorter prompts, or a model with a longer context",
    EMPTY: "give prompts that have tokens",
    UNKNOWN_TOKEN: "give a model whose tokenizer is its own",
    TEMPLATE: "correct the model's chat template, or the prompts",
}


@dataclass(kw_only=True, slots=True)
class Lengths:
    """Of the training or the held-out prompts, or of a sample of them."""

    what: str
    num_prompts: int
    lengths: list[int] = field(default_factory=list)
    """Tokens of those that could be encoded."""
    misfits: Counter[str] = field(default_factory=Counter)
    """Prompts that cannot be served, by reason."""
    firsts: dict[str, str] = field(default_factory=dict)
    """The first of each reason, in words."""
    num_cut: int = 0
    """Prompts that fit, but leave less room than actors.max_new_tokens."""

    @property
    def num_seen(self) -> int:
        return len(self.lengths) + self.misfits[TEMPLATE]

    @property
    def sample(self) -> str:
        return "" if self.num_seen == self.num_prompts else f" in a sample of {self.num_seen:,}"


def check_prompts(
    config: Config,
    model: CheckedModel,
    tokenizer: PromptTokenizer,
    parts: Sequence[tuple[str, Sequence[Prompt]]],
    findings: Findings,
) -> list[Lengths]:
    """`parts` are the training and the held-out prompts, with their names."""
    measured = [_measure(config, model, tokenizer, what, prompts) for what, prompts in parts]
    for part in measured:
        _judge(config, model, part, findings)
    return measured


def describe(part: Lengths) -> str:
    if not part.lengths:
        return f"{part.what}: none could be encoded"
    low, middle, high = min(part.lengths), statistics.median(part.lengths), max(part.lengths)
    return (
        f"{part.what}: {part.num_prompts:,} prompts of {low} to {high} tokens, median "
        f"{middle:g}{part.sample}"
    )


def _measure(
    config: Config,
    model: CheckedModel,
    tokenizer: PromptTokenizer,
    what: str,
    prompts: Sequence[Prompt],
) -> Lengths:
    part = Lengths(what=what, num_prompts=len(prompts))
    for prompt, ids in _encoded(tokenizer, _sample(prompts)):
        if isinstance(ids, str):
            _note(part, TEMPLATE, prompt, f"the chat template refuses it: {ids}")
            continue
        part.lengths.append(len(ids))
        _fit(part, prompt, ids, config.actors.max_new_tokens, model)
    return part


def _fit(
    part: Lengths, prompt: Prompt, ids: Sequence[int], max_new_tokens: int, model: CheckedModel
) -> None:
    context, vocab_size = model.context_length, model.facts.vocab_size
    if not ids:
        _note(part, EMPTY, prompt, "it has no tokens")
    elif context is not None and len(ids) >= context:
        _note(part, TOO_LONG, prompt, f"{len(ids):,} tokens and no room for a completion")
    elif vocab_size is not None and max(ids) >= vocab_size:
        _note(part, UNKNOWN_TOKEN, prompt, f"token {max(ids)}, and the model knows {vocab_size}")
    elif context is not None and len(ids) + max_new_tokens > context:
        part.num_cut += 1


def _note(part: Lengths, reason: str, prompt: Prompt, detail: str) -> None:
    part.misfits[reason] += 1
    part.firsts.setdefault(
        reason, f"prompt {prompt.prompt_id}, {_beginning(prompt.text)!r}: {detail}"
    )


def _beginning(text: str) -> str:
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


def _sample(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """All, or every n-th where there is too much text."""
    size = sum(len(prompt.text) for prompt in prompts)
    return prompts[:: -(-size // MAX_CHARACTERS)] if size > MAX_CHARACTERS else prompts


def _encoded(
    tokenizer: PromptTokenizer, prompts: Sequence[Prompt]
) -> Iterator[tuple[Prompt, list[int] | str]]:
    """Token ids, or why the chat template refuses the prompt."""
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        try:
            yield from zip(batch, tokenizer.encode([each.text for each in batch]), strict=True)
        except (TemplateError, TypeError, ValueError):
            yield from ((each, _encode_one(tokenizer, each)) for each in batch)


def _encode_one(tokenizer: PromptTokenizer, prompt: Prompt) -> list[int] | str:
    try:
        return tokenizer.encode([prompt.text])[0]
    except (TemplateError, TypeError, ValueError) as error:
        return str(error)


def _judge(config: Config, model: CheckedModel, part: Lengths, findings: Findings) -> None:
    num_misfits = sum(part.misfits.values())
    if num_misfits and num_misfits == part.num_seen:
        reason, first = next(iter(part.firsts.items()))
        field, value = _field(config, model, reason)
        findings.errors.append(
            ConfigError(
                field,
                value,
                f"not one of the {part.what} prompts fits the model: {REMEDIES[reason]}; the first "
                f"is {part.what} {first}",
            )
        )
        return
    lost = "count as wrong" if part.what == "held-out" else "cannot be trained on"
    for reason, count in part.misfits.items():
        findings.warnings.append(
            f"{count:,} of {part.num_seen:,} {part.what} prompts {lost} ({reason}); the first is "
            f"{part.firsts[reason]}"
        )
    if part.num_cut:
        room = f"{model.context_length} tokens of context less its own"
        findings.warnings.append(
            f"{part.num_cut:,} of {part.num_seen:,} {part.what} prompts leave less room than "
            f"actors.max_new_tokens = {config.actors.max_new_tokens}: a completion gets at most "
            f"{room}, {(model.context_length or 0) - max(_fitting(part, model))} tokens for the "
            "longest prompt that fits"
        )


def _fitting(part: Lengths, model: CheckedModel) -> list[int]:
    return [each for each in part.lengths if 0 < each < (model.context_length or each + 1)]


def _field(config: Config, model: CheckedModel, reason: str) -> tuple[str, object]:
    if reason == TOO_LONG:
        return "model.context_length", model.context_length
    if reason == TEMPLATE:
        return "model.chat_template", True
    return "model.path", config.model.path
