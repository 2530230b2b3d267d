"""Prompts to tokens: the short way through the Rust tokenizer gives what transformers gives."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from speed_async.actors.prompt_codec import PromptCodec
from speed_async.errors import ConfigError, ModelError

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


VOCABULARY = ("<unk>", "<s>", "</s>", "<|end|>", *"abc12+=|.")


def made_tokenizer(pattern: str, **more: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters that puts special tokens where `pattern` says."""
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.post_processor = processors.TemplateProcessing(
        single=pattern, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|end|>"],
        **more,
    )


def tokens(codec: PromptCodec, text: str) -> list[str]:
    return [VOCABULARY[number] for number in codec.encode(text)]


@pytest.mark.parametrize(
    ("pattern", "front"),
    [("<s> $A", ["<s>"]), ("<s> $A </s>", ["<s>"]), ("$A </s>", []), ("$A", [])],
)
def test_a_prompt_has_what_the_tokenizer_puts_in_front_and_nothing_behind(
    pattern: str, front: list[str]
) -> None:
    codec = PromptCodec(made_tokenizer(pattern), chat_template=False)
    assert tokens(codec, "1+2=") == [*front, *"1+2="]


def test_a_text_that_begins_with_bos_has_one() -> None:
    codec = PromptCodec(made_tokenizer("<s> $A </s>"), chat_template=False)
    assert tokens(codec, "<s>1+2=") == ["<s>", *"1+2="]


@pytest.mark.parametrize("front", [["<s>"], []])
def test_with_a_chat_template_the_template_alone_puts_special_tokens(front: list[str]) -> None:
    template = "".join(front) + "{{ messages[0].content }}|"
    tokenizer = made_tokenizer("<s> $A </s>", chat_template=template)
    assert tokens(PromptCodec(tokenizer, chat_template=True), "1+") == [*front, *"1+|"]


def test_a_special_tokens_string_inside_a_prompt_is_that_token_as_when_serving() -> None:
    plain = PromptCodec(made_tokenizer("<s> $A"), chat_template=False)
    assert tokens(plain, "a<|end|>b</s>") == ["<s>", "a", "<|end|>", "b", "</s>"]
    tokenizer = made_tokenizer("<s> $A", chat_template="<s>{{ messages[0].content }}|")
    chat = PromptCodec(tokenizer, chat_template=True)
    served: Any = tokenizer.apply_chat_template([{"role": "user", "content": "a<|end|>b"}])
    assert chat.encode("a<|end|>b").tolist() == served["input_ids"]


def test_a_prompt_that_the_chat_template_refuses_is_that_prompts_failure() -> None:
    template = (
        "{% if '1' in messages[0].content %}{{ raise_exception('no ones here') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    codec = PromptCodec(made_tokenizer("$A", chat_template=template), chat_template=True)
    with pytest.raises(ModelError, match=r"chat template refuses it .*no ones here"):
        codec.encode("1+2=")
    assert tokens(codec, "a+b") == ["a", "+", "b"]


def test_a_text_that_the_tokenizer_cannot_take_is_that_prompts_failure() -> None:
    codec = PromptCodec(made_tokenizer("$A"), chat_template=False)
    with pytest.raises(ModelError, match="tokenizer cannot encode it"):
        codec.encode("a\ud800")
    assert tokens(codec, "a") == ["a"]
