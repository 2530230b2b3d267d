"""Checks prompts against the context length: counts unusable prompts by reason, with examples."""

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
"""Above this many characters, only a sample of the prompts is encoded (some seconds of work)."""
NUM_BLOCKS = 64
PROBED_PER_BLOCK = 16
TOO_LONG, EMPTY, UNKNOWN_TOKEN, TEMPLATE = "too long", "empty", "unknown token", "template"
OVER_LIMIT = "over task.max_prompt_tokens"
TRAINING = "training"
"""Name of the prompts that are trained on."""
REMEDIES = {
    OVER_LIMIT: "raise the limit, or use shorter prompts",
    TOO_LONG: "use shorter prompts, or a model with a longer context",
    EMPTY: "use prompts with at least one token",
    UNKNOWN_TOKEN: "use a model with a matching tokenizer",
    TEMPLATE: "fix the model's chat template, or the prompts",
}


@dataclass(kw_only=True, slots=True)
class Lengths:
    """Lengths of the training prompts, the held-out prompts or those of a suite, or of a sample of
    them."""

    what: str
    num_prompts: int
    lengths: list[int] = field(default_factory=list)
    """Number of tokens of each prompt that could be encoded."""
    unusable: Counter[str] = field(default_factory=Counter)
    """Number of unusable prompts by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """Description of the first unusable prompt by reason."""
    num_limited: int = 0
    """Prompts that fit, but leave less space than actors.max_new_tokens."""

    @property
    def num_seen(self) -> int:
        return len(self.lengths) + self.unusable[TEMPLATE]

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
    """Measure and check prompts. `parts`: those of training, held out and of suites, by name."""
    measured = [_measure(config, model, tokenizer, what, prompts) for what, prompts in parts]
    for part in measured:
        _report(config, model, part, findings)
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
            _add_unusable(part, TEMPLATE, prompt, f"the chat template fails on it: {ids}")
            continue
        part.lengths.append(len(ids))
        _check_fit(config, model, part, prompt, ids)
    return part


def _check_fit(
    config: Config, model: CheckedModel, part: Lengths, prompt: Prompt, ids: Sequence[int]
) -> None:
    context, vocab_size = model.context_length, model.facts.vocab_size
    limit = config.task.max_prompt_tokens if part.what == TRAINING else None
    if not ids:
        _add_unusable(part, EMPTY, prompt, "no tokens")
    elif context is not None and len(ids) >= context:
        _add_unusable(part, TOO_LONG, prompt, f"{len(ids):,} tokens, no space for a completion")
    elif limit is not None and len(ids) > limit:
        _add_unusable(part, OVER_LIMIT, prompt, f"{len(ids):,} tokens")
    elif vocab_size is not None and max(ids) >= vocab_size:
        detail = f"token id {max(ids)} exceeds the vocabulary size {vocab_size}"
        _add_unusable(part, UNKNOWN_TOKEN, prompt, detail)
    elif context is not None and len(ids) + config.actors.max_new_tokens > context:
        part.num_limited += 1


def _add_unusable(part: Lengths, reason: str, prompt: Prompt, detail: str) -> None:
    part.unusable[reason] += 1
    part.examples.setdefault(
        reason, f"prompt {prompt.prompt_id}, {_shortened(prompt.text)!r}: {detail}"
    )


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


def _sample(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """All prompts, or evenly spaced blocks of them with about MAX_CHARACTERS characters."""
    if len(prompts) <= NUM_BLOCKS * PROBED_PER_BLOCK:
        size = sum(len(prompt.text) for prompt in prompts)
    else:
        probed = _blocks(prompts, PROBED_PER_BLOCK)
        size = sum(len(prompt.text) for prompt in probed) * len(prompts) // len(probed)
    if size <= MAX_CHARACTERS:
        return prompts
    num_prompts = max(1, MAX_CHARACTERS * len(prompts) // size)
    return _blocks(prompts, -(-num_prompts // NUM_BLOCKS))


def _blocks(prompts: Sequence[Prompt], num_each: int) -> list[Prompt]:
    """Neighbours rather than every n-th prompt: of prompts in a mapped file, these are in few
    pages, so the rest of the file does not count as memory of this process."""
    starts = (len(prompts) * block // NUM_BLOCKS for block in range(NUM_BLOCKS))
    chosen = dict.fromkeys(i for start in starts for i in range(start, start + num_each))
    return [prompts[i] for i in chosen if i < len(prompts)]


def _encoded(
    tokenizer: PromptTokenizer, prompts: Sequence[Prompt]
) -> Iterator[tuple[Prompt, list[int] | str]]:
    """Yield each prompt with its token ids, or with the error of the chat template."""
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


def _report(config: Config, model: CheckedModel, part: Lengths, findings: Findings) -> None:
    num_unusable = sum(part.unusable.values())
    if num_unusable and num_unusable == part.num_seen:
        reason, first = next(iter(part.examples.items()))
        field, value = _field(config, model, reason)
        findings.errors.append(
            ConfigError(
                field,
                value,
                f"none of the {part.what} prompts fits the model: {REMEDIES[reason]}; the first is "
                f"{part.what} {first}",
            )
        )
        return
    if part.what == TRAINING and config.task.long_prompts == "error":
        findings.errors += _long_prompts(config, part)
    effect = "cannot be trained on" if part.what == TRAINING else "count as wrong"
    for reason, count in part.unusable.items():
        findings.warnings.append(
            f"{count:,} of {part.num_seen:,} {part.what} prompts {effect} ({reason}); the first is "
            f"{part.examples[reason]}"
        )
    if part.num_limited:
        shortest = (model.context_length or 0) - max(_fitting(part, model))
        findings.warnings.append(
            f"{part.num_limited:,} of {part.num_seen:,} {part.what} prompts leave less space than "
            f"actors.max_new_tokens = {config.actors.max_new_tokens} in the context of "
            f"{model.context_length} tokens: the completion is limited to {shortest} tokens for "
            "the longest prompt that fits"
        )


def _long_prompts(config: Config, part: Lengths) -> list[ConfigError]:
    return [
        ConfigError(
            "task.long_prompts",
            config.task.long_prompts,
            f"{part.unusable[reason]:,} of {part.num_seen:,} training prompts are too long; the "
            f"first is {part.examples[reason]}. Use shorter prompts, or set 'leave_out'",
        )
        for reason in (TOO_LONG, OVER_LIMIT)
        if part.unusable[reason]
    ]


def _fitting(part: Lengths, model: CheckedModel) -> list[int]:
    return [each for each in part.lengths if 0 < each < (model.context_length or each + 1)]


def _field(config: Config, model: CheckedModel, reason: str) -> tuple[str, object]:
    if reason == TOO_LONG:
        return "model.context_length", model.context_length
    if reason == OVER_LIMIT:
        return "task.max_prompt_tokens", config.task.max_prompt_tokens
    if reason == TEMPLATE:
        return "model.chat_template", True
    return "model.path", config.model.path
