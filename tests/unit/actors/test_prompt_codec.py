"""Prompt encoding: the direct use of the Rust tokenizer is equivalent to transformers."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from speed_async.actors.prompt_codec import PromptCodec, configured_codec
from speed_async.config.sections.model import ModelConfig
from speed_async.errors import ConfigError, ModelError
from tests.fakes.paths import MODEL

TEMPLATE = "{% for m in messages %}<bos>{{ m.content }}{% endfor %}|"


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.mark.parametrize("text", ["1234+5678=", "", "a b\nc", "an unknown ü", "x" * 500])
def test_ids_equal_those_of_transformers(tokenizer, text: str):
    expected = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)(text).input_ids
    assert PromptCodec(tokenizer, chat_template=False).encode(text).tolist() == expected


def test_truncation_and_padding_settings_are_ignored(tokenizer):
    text = "1234+5678="
    whole = tokenizer(text).input_ids
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert PromptCodec(tokenizer, chat_template=False).encode(text).tolist() == whole


def test_chat_template_adds_its_own_special_tokens(tokenizer):
    tokenizer.chat_template = TEMPLATE
    ids = PromptCodec(tokenizer, chat_template=True).encode("1+1=").tolist()
    assert ids == tokenizer("1+1=|").input_ids  # one <bos>, the template's
    assert ids.count(tokenizer.bos_token_id) == 1


def test_missing_chat_template_raises(tokenizer):
    with pytest.raises(ConfigError, match=r"model\.chat_template"):
        PromptCodec(tokenizer, chat_template=True)


def test_decoding_drops_special_tokens(tokenizer):
    codec = PromptCodec(tokenizer, chat_template=False)
    assert codec.decode(codec.encode("12+3=")) == "12+3="


VOCABULARY = ("<unk>", "<s>", "</s>", "<|end|>", *"abc12+=|.")


def make_tokenizer(pattern: str, **kwargs: str) -> PreTrainedTokenizerFast:
    """A character tokenizer that adds special tokens according to `pattern`."""
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
        **kwargs,
    )


def tokens(codec: PromptCodec, text: str) -> list[str]:
    return [VOCABULARY[number] for number in codec.encode(text)]


@pytest.mark.parametrize(
    ("pattern", "prefix"),
    [("<s> $A", ["<s>"]), ("<s> $A </s>", ["<s>"]), ("$A </s>", []), ("$A", [])],
)
def test_prompt_has_prepended_but_no_appended_special_tokens(
    pattern: str, prefix: list[str]
) -> None:
    codec = PromptCodec(make_tokenizer(pattern), chat_template=False)
    assert tokens(codec, "1+2=") == [*prefix, *"1+2="]


def test_text_that_starts_with_bos_has_one_bos() -> None:
    codec = PromptCodec(make_tokenizer("<s> $A </s>"), chat_template=False)
    assert tokens(codec, "<s>1+2=") == ["<s>", *"1+2="]


@pytest.mark.parametrize("prefix", [["<s>"], []])
def test_with_a_chat_template_only_the_template_adds_special_tokens(prefix: list[str]) -> None:
    template = "".join(prefix) + "{{ messages[0].content }}|"
    tokenizer = make_tokenizer("<s> $A </s>", chat_template=template)
    assert tokens(PromptCodec(tokenizer, chat_template=True), "1+") == [*prefix, *"1+|"]


def test_special_token_strings_in_a_prompt_are_encoded_as_special_tokens() -> None:
    plain = PromptCodec(make_tokenizer("<s> $A"), chat_template=False)
    assert tokens(plain, "a<|end|>b</s>") == ["<s>", "a", "<|end|>", "b", "</s>"]
    tokenizer = make_tokenizer("<s> $A", chat_template="<s>{{ messages[0].content }}|")
    chat = PromptCodec(tokenizer, chat_template=True)
    served: Any = tokenizer.apply_chat_template([{"role": "user", "content": "a<|end|>b"}])
    assert chat.encode("a<|end|>b").tolist() == served["input_ids"]


def test_the_system_prompt_and_template_arguments_reach_the_template() -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'system' %}|{% endif %}{% endfor %}"
        "{% if enable_thinking %}={% else %}.{% endif %}"
    )
    model = ModelConfig(
        path="",
        chat_template=True,
        system_prompt="abc",
        template_arguments={"enable_thinking": True},
    )
    tokenizer = make_tokenizer("$A", chat_template=template)
    assert tokens(configured_codec(tokenizer, model), "1+2") == [*"abc|1+2="]
    plain = ModelConfig(path="", chat_template=True)
    assert tokens(configured_codec(tokenizer, plain), "1+2") == [*"1+2."]


def test_prompt_rejected_by_the_chat_template_raises() -> None:
    template = (
        "{% if '1' in messages[0].content %}{{ raise_exception('no ones here') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    codec = PromptCodec(make_tokenizer("$A", chat_template=template), chat_template=True)
    with pytest.raises(ModelError, match=r"chat template rejects it .*no ones here"):
        codec.encode("1+2=")
    assert tokens(codec, "a+b") == ["a", "+", "b"]


def test_text_that_cannot_be_encoded_raises() -> None:
    codec = PromptCodec(make_tokenizer("$A"), chat_template=False)
    with pytest.raises(ModelError, match="tokenizer cannot encode it"):
        codec.encode("a\ud800")
    assert tokens(codec, "a") == ["a"]
