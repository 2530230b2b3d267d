"""Prompt sets with a chosen spread of pass rates under the quickstart's model.

The answer to a sum is one string, so the pass rate of a prompt at temperature 1 is exactly the
probability of that string and the end of sequence. One forward pass computes it, without sampling.

Shape legend: Q prompts, L tokens, A answer tokens.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from speed_async.environments.arithmetic import ArithmeticTask
from speed_async.types import Prompt

CHUNK = 500
NUM_DIGITS = 4
HARD, EASY = 0.05, 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Shares of prompts by pass rate under the initial model."""

    out_of_reach: float
    """Never solved and not learnable within a run: products, which the model has never seen."""
    hard: float
    """Below HARD, but learnable within a run: sums with many carries."""
    easy: float
    """Above EASY: sums without a carry."""


SPREADS: Mapping[str, Spread] = {
    "mild": Spread(out_of_reach=0.0, hard=0.05, easy=0.05),
    "real": Spread(out_of_reach=0.35, hard=0.10, easy=0.20),
}
"""`real` follows DAPO-17k: 46 % of its prompts are below 5 % for a 1.5B model, and 35 % still are
for a 7B model, so most hard prompts stay hard while a model learns."""


@torch.no_grad()
def pass_rates(model_folder: Path, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    """(Q,) exact pass rates at temperature 1. All prompts, and all answers, have equal length."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(model_folder, local_files_only=True)
    num_prompt_tokens = len(tokenizer(prompts[0].text)["input_ids"])
    rates = []
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        texts = [f"{p.text}{p.answer}{tokenizer.eos_token}" for p in chunk]
        tokens_QL = torch.tensor(tokenizer(texts)["input_ids"])
        logits_QAV = model(input_ids=tokens_QL[:, :-1]).logits[:, num_prompt_tokens - 1 :]
        answers_QA1 = tokens_QL[:, num_prompt_tokens:, None]
        logprobs_QA = logits_QAV.log_softmax(-1).gather(-1, answers_QA1)[..., 0]
        rates.append(logprobs_QA.sum(-1).exp())
    return torch.cat(rates).float().numpy()


def write_prompts(
    path: Path, *, model_folder: Path, spread: Spread, num_prompts: int, seed: int
) -> dict[str, float]:
    """Write a data file for the `jsonl` task and return the resulting shares.

    Prompts between the two limits keep the proportions of the pool.
    """
    pool = ArithmeticTask(
        num_prompts=4 * num_prompts, num_held_out=0, max_digits=NUM_DIGITS, seed=seed
    ).train_prompts
    num_hard, num_easy = round(spread.hard * num_prompts), round(spread.easy * num_prompts)
    products = draw_products(random.Random(seed), round(spread.out_of_reach * num_prompts))
    drawn = [*pool, *products]
    all_rates = pass_rates(model_folder, drawn)
    rates_Q = all_rates[: len(pool)]
    num_between = num_prompts - num_hard - num_easy - len(products)
    parts = [
        (rates_Q < HARD, num_hard),
        (rates_Q > EASY, num_easy),
        ((rates_Q >= HARD) & (rates_Q <= EASY), num_between),
    ]
    chosen = np.concatenate([_first(where, count) for where, count in parts]).tolist()
    chosen += range(len(pool), len(drawn))
    prompts, rates = [drawn[q] for q in chosen], all_rates[chosen]
    random.Random(seed).shuffle(prompts)
    lines = [json.dumps({"prompt": p.text, "answer": p.answer, "level": p.level}) for p in prompts]
    path.write_text("\n".join(lines) + "\n")
    return {
        "num_prompts": float(len(prompts)),
        "under_5_percent": float((rates < HARD).mean()),
        "over_95_percent": float((rates > EASY).mean()),
        "mean": float(rates.mean()),
    }


def draw_products(rng: random.Random, count: int) -> list[Prompt]:
    """Distinct products in the format of the sums, with the answer cut to the sums' length."""
    prompts: dict[str, Prompt] = {}
    while len(prompts) < count:
        left, right = rng.randrange(10**NUM_DIGITS), rng.randrange(10**NUM_DIGITS)
        text = f"{left:04d}"[::-1] + "*" + f"{right:04d}"[::-1] + "="
        answer = f"{left * right:0{2 * NUM_DIGITS}d}"[::-1][: NUM_DIGITS + 1]
        prompts[text] = Prompt(
            prompt_id=len(prompts), text=text, answer=answer, level="out of reach"
        )
    return list(prompts.values())


def _first(where: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    found = np.flatnonzero(where)
    if len(found) < count:
        raise ValueError(f"the pool has {len(found)} prompts of a kind, {count} are needed")
    return found[:count]
