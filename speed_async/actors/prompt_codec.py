"""Text to tokens and back, as the model's tokenizer has it."""

from typing import Any

import numpy as np

from speed_async.errors import ConfigError
from speed_async.types import Int32Array


class PromptCodec:
    """Wraps a transformers tokenizer; with `chat_template` a prompt becomes one user message."""

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

    def encode(self, text: str) -> Int32Array:
        """Token ids (P,) of a prompt, with the special tokens the tokenizer puts in front."""
        if self._chat_template:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        add_special_tokens = not self._chat_template
        if self._backend is not None:
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        else:
            ids = self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids
        return np.array(ids, np.int32)

    def decode(self, token_ids: Int32Array) -> str:
        return self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)
