"""Encodes prompts like transformers, without its import: milliseconds.

Loads the model's tokenizer with the `tokenizers` library, and renders its chat template.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from speed_async.actors.prompt_codec import NOT_ONE_TOKEN, chat_messages
from speed_async.config.model_facts import read_json
from speed_async.config.schema import Config
from speed_async.config.sections.model import ModelConfig
from speed_async.errors import ConfigError, ModelError, SpeedAsyncError
from speed_async.launcher.preflight.findings import Findings

FILE = "tokenizer.json"
OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
PLAIN_CLASSES = (None, "TokenizersBackend", "PreTrainedTokenizerFast")
"""Tokenizer classes that define no special tokens."""
TEMPLATE_FILE = "chat_template.jinja"
ANSWER = "made-up answer"
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""Tags for training masks; they render no text."""


class ChatTemplate:
    def __init__(self, text: str, special_tokens: Mapping[str, str], model: ModelConfig) -> None:
        """Raises jinja2.TemplateError if the text is not a valid template."""
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._template = environment.from_string(_GENERATION.sub("", text))
        self._variables = {**special_tokens, **model.template_arguments}
        self._system_prompt = model.system_prompt

    def render(self, prompt: str) -> str:
        """Render one prompt and the generation prompt. The template may raise."""
        return self._render(chat_messages(prompt, self._system_prompt), True)

    def after_answer(self) -> str:
        """What the template renders after an answer of the model. The template may raise."""
        answer = {"role": "assistant", "content": ANSWER}
        text = self._render([*chat_messages("2 + 2 =", self._system_prompt), answer], False)
        return text.rpartition(ANSWER)[2]

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self._template.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )


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

    def token_ids(self, text: str) -> list[int]:
        """Token ids of plain text, without the chat template and prepended tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def is_unknown(self, token_id: int) -> bool:
        """Whether the token stands for text that is not in the vocabulary."""
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        return unknown is not None and self._tokenizer.id_to_token(token_id) == unknown

    def end_of_turn(self) -> int | None:
        """Token with which the chat template ends an answer; None if it ends with plain text."""
        from jinja2 import TemplateError

        if self._template is None:
            return None
        try:
            ids = self.token_ids(self._template.after_answer().lstrip())
        except (TemplateError, TypeError, ValueError):
            return None  # some templates render no answers
        return ids[0] if ids and ids[0] in self._tokenizer.get_added_tokens_decoder() else None

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Text of each token, including special tokens."""
        return [self._tokenizer.decode([each], skip_special_tokens=False) for each in ids]


def check_tokenizer(config: Config, folder: Path, findings: Findings) -> PromptTokenizer | None:
    """Load the tokenizer. Returns None if it is unusable or only transformers can read it."""
    from tokenizers import Tokenizer

    if not folder.is_dir():
        return None  # reported by config/checks/combinations.py
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
        used = config.model.chat_template
        template = _template(folder, special_tokens, config.model) if used else None
        loaded = PromptTokenizer(tokenizer, template)
        eos = special_tokens.get("eos_token")
        _check_stop_tokens(loaded, _eos_ids(folder, tokenizer, eos), config.model, findings)
    except SpeedAsyncError as error:
        findings.errors.append(error)
        return None
    return loaded


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


def _eos_ids(folder: Path, tokenizer: Any, eos: str | None) -> set[int]:
    """As in the engine (actors/model_folder.py). Raises ModelError."""
    found = set() if eos is None else {tokenizer.token_to_id(eos)} - {None}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("eos_token_id")
            found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found


def _check_stop_tokens(
    tokenizer: PromptTokenizer, eos_ids: set[int], model: ModelConfig, findings: Findings
) -> None:
    """Check `model.stop_tokens`, and that completions stop where the chat template ends a turn.

    Raises ConfigError for a stop token that is not one token.
    """
    stop_ids = set(eos_ids)
    for text in model.stop_tokens:
        ids = tokenizer.token_ids(text)
        if len(ids) != 1 or tokenizer.is_unknown(ids[0]):
            raise ConfigError("model.stop_tokens", text, NOT_ONE_TOKEN)
        stop_ids.update(ids)
    if model.stop_tokens:
        shown = ", ".join(map(repr, tokenizer.pieces(sorted(stop_ids))))
        findings.show("completions end at", [shown])
    end = tokenizer.end_of_turn()
    if end is None or not stop_ids or end in stop_ids:
        return
    [text] = tokenizer.pieces([end])
    ends = ", ".join(map(repr, tokenizer.pieces(sorted(stop_ids))))
    findings.warnings.append(
        f"the chat template ends a turn with {text!r}, but completions end at {ends} only: the "
        "model may continue with further turns up to the length limit. Set "
        f"model.stop_tokens = [{json.dumps(text, ensure_ascii=False)}], or use a model that was "
        "trained on this template"
    )


def _template(folder: Path, special_tokens: dict[str, str], model: ModelConfig) -> ChatTemplate:
    from jinja2 import TemplateError

    text = _find_template(folder)
    if text is None:
        remedy = "this model's tokenizer has no chat template; set false"
        raise ConfigError("model.chat_template", True, remedy)
    try:
        template = ChatTemplate(text, special_tokens, model)
        template.render("2 + 2 =")
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(
            "model.chat_template", True, f"the chat template fails on a user message: {error}"
        ) from None
    return template


def _find_template(folder: Path) -> str | None:
    """Return the template's text, or None. Raises ModelError for an unreadable file."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    found = read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(found, list):  # several templates with names
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found else None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
