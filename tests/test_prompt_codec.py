"""Prompts to tokens: the short way through the Rust tokenizer gives what transformers gives."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from speed_async.actors.prompt_codec import PromptCodec
from speed_async.errors import ConfigError

MODEL = Path(__file__).parent.parent / "quickstart" / "model"
TEMPLATE = "{% for m in messages %}<bos>{{ m.content }}{% endfor %}|"


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.mark.parametrize("text", ["1234+5678=", "", "a b\nc", "an unknown ü", "x" * 500])
def test_the_ids_are_those_of_the_tokenizers_own_call(tokenizer, text: str):
    expected = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)(text).input_ids
    assert PromptCodec(tokenizer, chat_template=False).encode(text).tolist() == expected


def test_settings_that_cut_or_pad_do_not_reach_prompts(tokenizer):
    text = "1234+5678="
    whole = tokenizer(text).input_ids
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert PromptCodec(tokenizer, chat_template=False).encode(text).tolist() == whole


def test_a_chat_template_puts_its_own_special_tokens(tokenizer):
    tokenizer.chat_template = TEMPLATE
    ids = PromptCodec(tokenizer, chat_template=True).encode("1+1=").tolist()
    assert ids == tokenizer("1+1=|").input_ids  # one <bos>, the template's
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_missing_chat_template_is_said(tokenizer):
    with pytest.raises(ConfigError, match=r"model\.chat_template"):
        PromptCodec(tokenizer, chat_template=True)


def test_decoding_drops_special_tokens(tokenizer):
    codec = PromptCodec(tokenizer, chat_template=False)
    assert codec.decode(codec.encode("12+3=")) == "12+3="
