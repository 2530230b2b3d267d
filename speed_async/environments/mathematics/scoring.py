"""The rules of `task.match = "math"`: extraction, the exact path, then math-verify."""

from speed_async.environments.final_answer import final_answer
from speed_async.environments.mathematics.comparison import MAX_CHARS, same_math
from speed_async.environments.mathematics.extraction import math_answer
from speed_async.environments.mathematics.fallback import fallback_verdict, is_askable


def is_correct(completion: str, answer: str) -> bool:
    """Whether the stated answer of `completion` equals the ground truth.

    May raise or hang inside math-verify. The verifier pool turns both into an outcome of its own:
    such a completion is never scored 0.
    """
    candidate = math_answer(completion)
    return candidate is not None and same_answer(candidate, final_answer(answer))


def same_answer(candidate: str, answer: str) -> bool:
    """Whether two answers are equal, by the exact path or by math-verify."""
    decided = same_math(candidate, answer)
    if decided is not None:
        return decided
    return is_askable(candidate, answer) and fallback_verdict(candidate, answer)


def math_answer_error(answer: str) -> str:
    """Why a ground truth cannot be used, or "". One that only math-verify can read is accepted."""
    length = len(final_answer(answer))
    if length > MAX_CHARS:
        return f"'answer' has {length:,} characters, more than {MAX_CHARS:,}: shorten or remove it"
    return ""
