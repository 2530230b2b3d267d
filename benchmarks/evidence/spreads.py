"""Prompt sets with a chosen spread of exact pass rates under the quickstart's model.

Hard and easy prompts are sums with many carries and with none. Prompts out of reach are products,
which the model has never seen: their pass rate is below 1e-5 and no run of this length learns them.
Training prompts and scored prompts are disjoint and have the same spread.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.evidence.pass_rates import ExactScorer
from speed_async.environments.arithmetic import ArithmeticTask
from speed_async.types import Prompt

NUM_DIGITS = 4
NUM_ANSWER_CHARACTERS = NUM_DIGITS + 1
EASY = 0.95
POOL_PER_PROMPT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Shares of prompts by pass rate under the initial model; the rest is between, with the
    proportions of the pool."""

    out_of_reach: float
    hard: float
    """Below `hard_below`, but learnable within a run."""
    easy: float
    """Above EASY."""
    hard_below: float = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    train: list[Prompt]
    scored: list[Prompt]
    train_rates: NDArray[np.float64]
    scored_rates: NDArray[np.float64]
    """Exact pass rates under the initial model."""

    @property
    def digest(self) -> str:
        """Of all texts and answers, in order."""
        lines = [f"{p.text}{p.answer}" for p in (*self.train, *self.scored)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]

    def write_train(self, path: Path) -> None:
        """The file of `LiteralTask`."""
        lines = [
            json.dumps({"prompt": p.text, "answer": p.answer, "level": p.level}) for p in self.train
        ]
        path.write_text("\n".join(lines) + "\n")


def acceptance(rates: NDArray[np.float64], n_init: int = 4) -> float:
    """Share of prompts that a gate of 0 and 1 continues after `n_init` completions."""
    return float((1 - rates**n_init - (1 - rates) ** n_init).mean())


def make_prompts(
    spread: Spread, *, model_folder: Path, num_train: int, num_scored: int, seed: int
) -> PromptSet:
    """Training and scored prompts of one spread. Raises ValueError if the pool is too small."""
    total = num_train + num_scored
    pool = ArithmeticTask(
        num_prompts=POOL_PER_PROMPT * total, num_held_out=0, max_digits=NUM_DIGITS, seed=seed
    ).train_prompts
    rates = ExactScorer(model_folder, pool).pass_rates(model_folder)
    rng = random.Random(seed)
    products = iter(draw_products(rng, round(spread.out_of_reach * total) + 2))
    kinds = {
        "hard": (rates < spread.hard_below, spread.hard),
        "easy": (rates > EASY, spread.easy),
        "between": (
            (rates >= spread.hard_below) & (rates <= EASY),
            1 - spread.out_of_reach - spread.hard - spread.easy,
        ),
    }
    found = {kind: iter(np.flatnonzero(where).tolist()) for kind, (where, _) in kinds.items()}
    sets: list[list[Prompt]] = []
    for count in (num_train, num_scored):
        chosen = [next(products) for _ in range(round(spread.out_of_reach * count))]
        for kind, (_, share) in kinds.items():
            chosen += [pool[index] for index in _take(found[kind], round(share * count), kind)]
        rng.shuffle(chosen)
        sets.append(chosen)
    both_rates = [ExactScorer(model_folder, each).pass_rates(model_folder) for each in sets]
    return PromptSet(
        train=sets[0], scored=sets[1], train_rates=both_rates[0], scored_rates=both_rates[1]
    )


def _take(indices: Iterator[int], count: int, kind: str) -> list[int]:
    taken = list(islice(indices, count))
    if len(taken) < count:
        raise ValueError(f"the pool has {len(taken)} {kind} prompts left, {count} are needed")
    return taken


def draw_products(rng: random.Random, count: int) -> list[Prompt]:
    """Distinct products in the format of the sums, with the answer cut to the sums' length."""
    prompts: dict[str, Prompt] = {}
    while len(prompts) < count:
        left, right = rng.randrange(10**NUM_DIGITS), rng.randrange(10**NUM_DIGITS)
        text = f"{left:04d}"[::-1] + "*" + f"{right:04d}"[::-1] + "="
        answer = f"{left * right:0{2 * NUM_DIGITS}d}"[::-1][:NUM_ANSWER_CHARACTERS]
        prompts[text] = Prompt(
            prompt_id=len(prompts), text=text, answer=answer, level="out of reach"
        )
    return list(prompts.values())
