"""Exact pass rates: against sampling, and against all completions of two tokens."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.evidence.pass_rates import ExactScorer, exact_only
from benchmarks.evidence.plan import ARMS, Setting, overrides
from benchmarks.evidence.spreads import NUM_ANSWER_CHARACTERS
from benchmarks.evidence.task import LiteralTask
from speed_async.config.load import load_config
from speed_async.config.sections.task import TaskConfig
from speed_async.types import Prompt
from tests.fakes.paths import MODEL, REPOSITORY

QUICKSTART = str(REPOSITORY / "quickstart" / "config.toml")
SAMPLES = 2000


def prompt(text: str, answer: str, index: int = 0) -> Prompt:
    return Prompt(prompt_id=index, text=text, answer=answer)


@pytest.fixture
def task(tmp_path) -> LiteralTask:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "0+0=", "answer": "00", "level": ""}\n')
    return LiteralTask(TaskConfig(name="m:t", path=str(path), num_held_out=1))


def test_exact_pass_rates_agree_with_sampling(task: LiteralTask) -> None:
    """Completions are sampled up to the limit of the experiment; truncated ones do not pass."""
    texts = [("1111+2222=", "33330"), ("5000+6000=", "11000"), ("9100+2000=", "11100")]
    texts += [("9999+9999=", "89991"), ("2610+5310=", "7920" + "0")]
    prompts = [prompt(*each, index) for index, each in enumerate(texts)]
    rates = ExactScorer(MODEL, prompts).pass_rates(MODEL)
    assert rates.min() < 0.05
    assert rates.max() > 0.9
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    torch.manual_seed(0)
    for each, rate in zip(prompts, rates, strict=True):
        ids = torch.tensor([tokenizer(each.text)["input_ids"]] * SAMPLES)
        sampled = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_ANSWER_CHARACTERS + 1,
            do_sample=True,
            temperature=1.0,
            top_k=0,
        )[:, ids.shape[1] :]
        ended = (sampled == tokenizer.eos_token_id).any(1).tolist()
        completions = tokenizer.batch_decode(sampled, skip_special_tokens=True)
        passed = [
            task.score(each, text) * end for text, end in zip(completions, ended, strict=True)
        ]
        error = math.sqrt(rate * (1 - rate) / SAMPLES)
        assert abs(np.mean(passed) - rate) < 5 * error + 1 / SAMPLES


def test_exact_pass_rates_equal_the_sum_over_all_completions_that_pass(task: LiteralTask) -> None:
    """An answer of one digit: all 100 x 100 completions of at most two tokens."""
    each = prompt("1000+2000=", "3")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    size, eos = model.config.vocab_size, tokenizer.eos_token_id
    start = tokenizer(each.text)["input_ids"]
    with torch.no_grad():
        first = model(input_ids=torch.tensor([start])).logits[0, -1].double().softmax(-1)
        rows = torch.tensor([[*start, token] for token in range(size)])
        second = model(input_ids=rows).logits[:, -1].double().softmax(-1)
    total = 0.0
    for one, two in itertools.product(range(size), range(size)):
        tokens = [one] if one == eos else [one, two]
        if tokens[-1] != eos or (one == eos and two):  # truncated, or the same completion again
            continue
        if task.score(each, tokenizer.decode(tokens, skip_special_tokens=True)) == 1.0:
            total += float(first[one]) * (float(second[one, two]) if one != eos else 1.0)
    rate = ExactScorer(MODEL, [each]).pass_rates(MODEL)[0]
    assert rate == pytest.approx(total, rel=1e-5)
    assert rate > 0


def test_answers_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        ExactScorer(MODEL, [prompt("1+2=", "30"), prompt("1+2=", "3")])


def test_a_sampling_that_lets_other_strings_pass_is_refused() -> None:
    values = overrides(ARMS["async-speed"], Setting(lr=1e-4, clip=1.0, shape=8), 0)
    exact_only(load_config(QUICKSTART, values), NUM_ANSWER_CHARACTERS)
    for field, value in {
        "actors.temperature": "0.7",
        "actors.max_new_tokens": "8",
        "task.score_truncated": "true",
    }.items():
        config = load_config(QUICKSTART, [*values, f"--{field}", value])
        with pytest.raises(ValueError, match=f"{field} = "):
            exact_only(config, NUM_ANSWER_CHARACTERS)


def test_only_the_answer_itself_passes(task: LiteralTask) -> None:
    each = prompt("1+2=", "03")
    completions = ("03", "3", " 03", "03 ", "+03")
    assert [task.score(each, completion) for completion in completions] == [1, 0, 0, 0, 0]
