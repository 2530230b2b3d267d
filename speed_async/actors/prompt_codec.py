"""Text to tokens and back, as the model's tokenizer has it and as a serving engine would."""

from typing import Any

import numpy as np

from speed_async.errors import ConfigError, ModelError
from speed_async.types import Int32Array

MAX_ERROR_CHARS = 300
"""Of a template's or a tokenizer's error, which may quote a whole prompt."""
_SAMPLES = ("a", "0", ".")


class PromptCodec:
    """Wraps a transformers tokenizer; with `chat_template` a prompt becomes one user message.

    A prompt ends where its completion begins: special tokens that the tokenizer appends (an EOS, a
    separator) are left out. Those it puts in front (a BOS) are there once, also where the text
    begins with them; with a chat template, the template alone puts them. A special token's string
    inside a prompt is that token, as in a serving engine.
    """

    def __init__(self, tokenizer: Any, *, chat_template: bool) -> None:
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "model.chat_template",
                True,
                "this model's tokenizer has no chat template; set false",
            )
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        # The Rust tokenizer behind a fast one: transformers' call costs twenty times as much for a
        # short prompt, and each lease makes one.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()

        self._prefix = [] if chat_template else self._put_in_front()

    def encode(self, text: str) -> Int32Array:
        """Token ids (P,) of a prompt. Raises ModelError for one that cannot be made into tokens."""
        if self._chat_template:
            text = self._rendered(text)
        try:
            ids = self._ids(text, add_special_tokens=False)
        except Exception as error:  # foreign code on foreign text: it costs this prompt alone
            raise ModelError(f"the tokenizer cannot encode it ({_described(error)})") from error
        if ids[: len(self._prefix)] != self._prefix:
            ids = self._prefix + ids
        return np.array(ids, np.int32)

    def _rendered(self, text: str) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates refuse by exceptions of their own
            raise ModelError(f"the chat template refuses it ({_described(error)})") from error

    def _put_in_front(self) -> list[int]:
        """The special tokens that this tokenizer puts before every text."""
        for sample in _SAMPLES:
            plain = self._ids(sample, add_special_tokens=False)
            whole = self._ids(sample, add_special_tokens=True)
            for start in range(len(whole) - len(plain) + 1):
                if plain and whole[start : start + len(plain)] == plain:
                    return whole[:start]
        return []

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids

    def decode(self, token_ids: Int32Array) -> str:
        return self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
