"""Prepares a model folder for an evaluation: tokenizer, prompts, context, digest."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_async.actors.model_folder import check_model_folder, load_tokenizer, usable_context
from speed_async.actors.prompt_codec import PromptCodec, configured_codec
from speed_async.config.local_model import model_folder
from speed_async.config.schema import Config
from speed_async.errors import ModelError
from speed_async.evaluation.protocols import PROTOCOLS
from speed_async.launcher.evaluation.plan import Target
from speed_async.launcher.evaluation.suites import Suite
from speed_async.launcher.identity.content import digest_files, digest_text
from speed_async.launcher.identity.model_files import (
    template_parts,
    tokenizer_parts,
    weight_files,
)
from speed_async.types import Int32Array


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedModel:
    name: str
    config: Config
    """With the local folder of the model, and the context length that the suites need."""
    context_limit: int
    """Prompt plus completion tokens that the model, or `model.context_length`, allows."""
    codec: PromptCodec
    token_ids: dict[str, list[Int32Array]]
    """Prompts by suite, encoded."""
    digest: str
    notes: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """What samples depend on, besides the suite."""
        return {
            "model": self.name,
            "model_digest": self.digest,
            "chat_template": self.config.model.chat_template,
            "system_prompt": self.config.model.system_prompt,
            "template_arguments": self.config.model.template_arguments,
            "stop_tokens": self.config.model.stop_tokens,
            "engine": self.config.actors.engine,
            "context_limit": self.context_limit,
        }


def prepare_model(target: Target, suites: Sequence[Suite]) -> PreparedModel:
    """Raises ModelError when the folder is unusable or a prompt does not fit into its context."""
    config = target.config
    folder = model_folder(config.model.path)
    check_model_folder(folder)
    tokenizer = load_tokenizer(folder)
    notes = []
    uses_template = config.model.chat_template
    if target.wants_chat_template and not getattr(tokenizer, "chat_template", None):
        uses_template = False
        notes.append("the tokenizer has no chat template, so prompts are sent as plain text")
    notes += _missing_tokens(tokenizer, suites)
    chat = config.model.model_copy(update={"chat_template": uses_template})
    codec = configured_codec(tokenizer, chat)
    token_ids = {
        suite.name: [codec.encode(suite.text(each)) for each in suite.prompts] for suite in suites
    }
    limit = _context_limit(folder, config)
    needed = 1
    for suite in suites:
        longest = _check_fit(suite, token_ids[suite.name], limit)
        needed = max(needed, longest + suite.max_new_tokens)
        if longest + suite.max_new_tokens > limit:
            notes.append(
                f"{suite.name}: the context of {limit:,} tokens limits some completions to "
                f"{limit - longest:,} tokens, fewer than max_new_tokens = {suite.max_new_tokens:,}"
            )
    model = chat.model_copy(update={"path": str(folder), "context_length": min(limit, needed)})
    return PreparedModel(
        name=target.name,
        config=config.model_copy(update={"model": model}),
        codec=codec,
        token_ids=token_ids,
        digest=model_digest(folder),
        notes=tuple(notes),
        context_limit=limit,
    )


def model_digest(folder: Path) -> str:
    """Digest of the whole content of weights, configuration, tokenizer and chat template."""
    paths = [*weight_files(folder), folder / "config.json"]
    paths += [path for path in [folder / "generation_config.json"] if path.is_file()]
    digests = digest_files(paths)
    files = {path.name: digests[str(path)].digest for path in paths}
    parts = files | tokenizer_parts(folder) | template_parts(folder)
    return digest_text(*(text for name in sorted(parts) for text in (name, parts[name])))


def _missing_tokens(tokenizer: Any, suites: Sequence[Suite]) -> list[str]:
    formats = {suite.format for suite in suites}
    vocabulary = tokenizer.get_vocab()
    return [
        f"the tokenizer has no special token {token}, which the prompt of the protocol "
        f"'{protocol.name}' contains: the model gets it as text"
        for protocol in PROTOCOLS.values()
        if protocol.format in formats
        for token in protocol.special_tokens
        if token not in vocabulary
    ]


def _context_limit(folder: Path, config: Config) -> int:
    from transformers import AutoConfig

    hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return usable_context(folder, hf_config, config.model.context_length)


def _check_fit(suite: Suite, token_ids: Sequence[Int32Array], limit: int) -> int:
    """Length of the longest prompt. Raises ModelError when a prompt leaves no space."""
    lengths = [len(each) for each in token_ids]
    longest = max(lengths, default=0)
    if not lengths:
        raise ModelError(f"suite '{suite.name}' has no prompts")
    too_long = sum(length >= limit for length in lengths)
    if too_long:
        raise ModelError(
            f"suite '{suite.name}': {too_long} of {len(lengths)} prompts do not fit into the "
            f"context of {limit:,} tokens (the longest has {longest:,}): use a model with a longer "
            "context, or a suite without them"
        )
    return longest
