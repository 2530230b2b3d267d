"""Loads the model's tokenizer with the `tokenizers` library: milliseconds, without transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed_async.config.model_facts import read_json
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, ModelError, SpeedAsyncError
from speed_async.launcher.preflight.chat_template import ChatTemplate, find_template
from speed_async.launcher.preflight.findings import Findings

FILE = "tokenizer.json"
OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
PLAIN_CLASSES = (None, "TokenizersBackend", "PreTrainedTokenizerFast")
"""Tokenizer classes that define no special tokens."""


class PromptTokenizer:
    """Encodes prompts exactly like the actors."""

    def __init__(self, tokenizer: Any, template: ChatTemplate | None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Raises jinja2.TemplateError for a prompt that the chat template rejects."""
        if self._template is not None:
            prompts = [self._template.render(prompt) for prompt in prompts]
        with_special = self._template is None
        batch = self._tokenizer.encode_batch_fast(list(prompts), add_special_tokens=with_special)
        return [encoding.ids for encoding in batch]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Text of each token, including special tokens."""
        return [self._tokenizer.decode([each], skip_special_tokens=False) for each in ids]


def check_tokenizer(config: Config, findings: Findings) -> PromptTokenizer | None:
    """Load the tokenizer. Returns None if it is unusable or only transformers can read it."""
    from tokenizers import Tokenizer

    folder = Path(config.model.path)
    if not folder.is_dir():
        return None  # reported by config/checks.py
    if not (folder / FILE).is_file():
        _report_missing_file(folder, findings)
        return None
    try:
        tokenizer = Tokenizer.from_file(str(folder / FILE))
    except Exception as error:  # the library raises Exception itself
        findings.errors.append(
            ModelError(f"the tokenizer '{folder / FILE}' cannot be read ({error}); save it again")
        )
        return None
    try:
        special_tokens, plain = _special_tokens(folder)
        _check_eos(folder, tokenizer, special_tokens.get("eos_token"), plain, findings)
        template = _template(config, special_tokens) if config.model.chat_template else None
    except SpeedAsyncError as error:
        findings.errors.append(error)
        return None
    return PromptTokenizer(tokenizer, template)


def _report_missing_file(folder: Path, findings: Findings) -> None:
    found = [name for name in OTHER_FILES if (folder / name).is_file()]
    if not found:
        findings.errors.append(
            ModelError(
                f"model folder '{folder}' has no tokenizer (no {FILE}): save one there with "
                "tokenizer.save_pretrained(folder)"
            )
        )
        return
    findings.warnings.append(
        f"the tokenizer of '{folder}' is {found[0]}, which only transformers can read: prompt "
        "lengths are not checked before the start"
    )


def _special_tokens(folder: Path) -> tuple[dict[str, str], bool]:
    """Special tokens by name, and whether the tokenizer's class adds no others."""
    tokens: dict[str, str] = {}
    kind: object = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        record = read_json(folder / name)
        kind = record.get("tokenizer_class", kind)
        for key, value in record.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                tokens[key] = text
    return tokens, kind in PLAIN_CLASSES


def _check_eos(
    folder: Path, tokenizer: Any, eos: str | None, plain: bool, findings: Findings
) -> None:
    if eos is None and plain:
        raise ModelError(
            f"the tokenizer in '{folder}' has no EOS token, so no completion could end: set "
            "eos_token in its tokenizer_config.json"
        )
    if eos is not None and tokenizer.token_to_id(eos) is None:
        findings.warnings.append(
            f"the EOS token {eos!r} of the tokenizer in '{folder}' is not in its {FILE}: "
            "transformers assigns it a new id, which the model may not know"
        )


def _template(config: Config, special_tokens: dict[str, str]) -> ChatTemplate:
    from jinja2 import TemplateError

    text = find_template(Path(config.model.path))
    if text is None:
        remedy = "this model's tokenizer has no chat template; set false"
        raise ConfigError("model.chat_template", True, remedy)
    try:
        template = ChatTemplate(text, special_tokens)
        template.render("2 + 2 =")
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(
            "model.chat_template", True, f"the chat template fails on a user message: {error}"
        ) from None
    return template
