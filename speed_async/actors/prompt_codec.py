"""Encodes prompts and decodes completions, consistent with a serving engine."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from speed_async.config.sections.model import ModelConfig
from speed_async.errors import ConfigError, ModelError
from speed_async.types import Int32Array

MAX_ERROR_CHARS = 300
"""Maximum length of a template or tokenizer error, which may quote a whole prompt."""
NOT_ONE_TOKEN = (
    "is not one token of this model; give the text of a single token, such as the end of a turn"
)
"""Remedy for a value of `model.stop_tokens`."""
_SAMPLES = ("a", "0", ".")


class PromptCodec:
    """Wraps a transformers tokenizer; with `chat_template` a prompt becomes one user message.

    Special tokens that the tokenizer appends (an EOS, a separator) are omitted, because the
    completion follows the prompt. Special tokens that it prepends (a BOS) occur exactly once, even
    when the text already starts with them; with a chat template, only the template adds them. The
    string of a special token inside a prompt is encoded as that token, as in a serving engine.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: bool,
        system_prompt: str | None = None,
        template_arguments: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        """As in `ModelConfig`. Raises ConfigError for a tokenizer without a chat template."""
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "model.chat_template",
                True,
                "this model's tokenizer has no chat template; set it to false",
            )
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._system_prompt = system_prompt
        self._template_arguments = dict(template_arguments)
        # The Rust tokenizer of a fast tokenizer. The transformers call takes 20 times as long for
        # a short prompt, and each lease encodes one.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()

        self._prefix = [] if chat_template else self._prepended_ids()

    def encode(self, text: str) -> Int32Array:
        """Token ids (P,) of a prompt. Raises ModelError when the prompt cannot be encoded."""
        if self._chat_template:
            text = self._render(text)
        try:
            ids = self._ids(text, add_special_tokens=False)
        except Exception as error:  # third-party code on user text: only this prompt fails
            raise ModelError(f"the tokenizer cannot encode it ({_describe(error)})") from error
        if ids[: len(self._prefix)] != self._prefix:
            ids = self._prefix + ids
        return np.array(ids, np.int32)

    def _render(self, text: str) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                chat_messages(text, self._system_prompt),
                add_generation_prompt=True,
                tokenize=False,
                **self._template_arguments,
            )
        except Exception as error:  # templates raise exceptions of their own
            raise ModelError(f"the chat template rejects it ({_describe(error)})") from error

    def _prepended_ids(self) -> list[int]:
        """Special tokens that this tokenizer prepends to every text."""
        for sample in _SAMPLES:
            plain = self._ids(sample, add_special_tokens=False)
            extended = self._ids(sample, add_special_tokens=True)
            for start in range(len(extended) - len(plain) + 1):
                if plain and extended[start : start + len(plain)] == plain:
                    return extended[:start]
        return []

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids

    def decode(self, token_ids: Int32Array) -> str:
        return self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)


def configured_codec(tokenizer: Any, model: ModelConfig) -> PromptCodec:
    """Raises ConfigError for a tokenizer without the chat template that `model` uses."""
    return PromptCodec(
        tokenizer,
        chat_template=model.chat_template,
        system_prompt=model.system_prompt,
        template_arguments=model.template_arguments,
    )


def chat_messages(prompt: str, system_prompt: str | None) -> list[dict[str, str]]:
    """Messages that the chat template gets for one prompt."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": prompt}]


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
