"""The arithmetic task of the quickstart: sums whose difficulty is the number of carries.

Operands have `max_digits` = W digits, zero-padded, least significant digit first, so that a model
generates the answer in the order of computation: 57 + 68 = 125 at W = 3 is `750+860=` with the
answer `5210` (W + 1 digits).
"""

import random
from collections.abc import Iterator

from speed_async.errors import TaskError
from speed_async.types import Prompt

_DIGIT_PAIRS = {
    (carry, carries): [
        (a, b) for a in range(10) for b in range(10) if (a + b + carry >= 10) == carries
    ]
    for carry in (0, 1)
    for carries in (False, True)
}
"""Digit pairs by incoming carry (0 or 1) and by whether they produce a carry."""


def level_cycle(rng: random.Random, max_digits: int) -> Iterator[int]:
    """Infinite iterator of levels (numbers of carries, 0..W).

    Every 3 W levels contain W times 0 and twice each of 1..W. A third of the prompts thus needs no
    carry, and the shares are exact in data sets of any size.
    """
    block = [0] * max_digits + [*range(1, max_digits + 1)] * 2
    while True:
        yield from rng.sample(block, len(block))


def draw_sum(rng: random.Random, *, num_digits: int, num_carries: int) -> tuple[str, str]:
    """(prompt text, answer) of a sum with exactly `num_carries` carries.

    The positions that carry are a uniform random subset. The digits of each position are uniform
    over the pairs that produce the required carry, given the incoming carry.
    """
    carrying = set(rng.sample(range(num_digits), num_carries))
    left, right, total = "", "", ""
    carry = 0
    for position in range(num_digits):
        a, b = rng.choice(_DIGIT_PAIRS[carry, position in carrying])
        left += str(a)
        right += str(b)
        total += str((a + b + carry) % 10)
        carry = int(position in carrying)
    return f"{left}+{right}=", total + str(carry)


class ArithmeticTask:
    """Addition with carries, determined by `seed`; see the module docstring for the format.

    All prompts are distinct, so training and held-out prompts are disjoint. The `level` of a
    prompt is `"carries=K"`. Raises TaskError when there are too few distinct sums.
    """

    def __init__(self, *, num_prompts: int, num_held_out: int, max_digits: int, seed: int) -> None:
        # Half of all sums, so that rejection sampling of new ones stays cheap.
        num_available = 100**max_digits // 2
        if num_prompts + num_held_out > num_available:
            raise TaskError(
                f"arithmetic with task.max_digits = {max_digits} has {num_available} distinct "
                f"prompts, but num_prompts + num_held_out = {num_prompts + num_held_out}: "
                "raise max_digits or request fewer prompts"
            )
        sums = _distinct_sums(random.Random(seed), max_digits)
        self.held_out_prompts = _take(sums, num_held_out, held_out=True)
        self.train_prompts = _take(sums, num_prompts, held_out=False)

    def score(self, prompt: Prompt, completion: str) -> float:
        """1.0 when the stripped completion equals the answer; else 0.0."""
        return float(completion.strip() == prompt.answer)

    def extract(self, completion: str) -> str | None:
        return completion.strip()


def _distinct_sums(rng: random.Random, max_digits: int) -> Iterator[tuple[str, str, int]]:
    """Infinite iterator of (text, answer, carries) with distinct texts."""
    seen: set[str] = set()
    for num_carries in level_cycle(rng, max_digits):
        text, answer = draw_sum(rng, num_digits=max_digits, num_carries=num_carries)
        while text in seen:
            text, answer = draw_sum(rng, num_digits=max_digits, num_carries=num_carries)
        seen.add(text)
        yield text, answer, num_carries


def _take(
    sums: Iterator[tuple[str, str, int]], count: int, *, held_out: bool
) -> tuple[Prompt, ...]:
    return tuple(
        Prompt(
            prompt_id=prompt_id,
            text=text,
            answer=answer,
            level=f"carries={num_carries}",
            held_out=held_out,
        )
        for prompt_id, (text, answer, num_carries) in zip(range(count), sums, strict=False)
    )
