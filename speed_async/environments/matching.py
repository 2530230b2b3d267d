r"""The values of `task.match`: how the final answer of a completion is compared with that of a row.

All of them extract the final answer from the last `\boxed{}`, else from after the last `####`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from speed_async.environments.exact_answer import exact_answer, same_answer
from speed_async.environments.final_answer import final_answer
from speed_async.environments.mathematics.extraction import math_answer
from speed_async.environments.mathematics.fallback import math_verify
from speed_async.environments.mathematics.scoring import is_correct, math_answer_error
from speed_async.environments.numeric_answer import (
    answer_number,
    last_number,
    last_number_text,
    same_number,
)
from speed_async.types import Prompt

MatchKind = Literal["exact", "numeric", "math"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Matching:
    """One value of `task.match`."""

    is_correct: Callable[[str, str], bool]
    """Of a completion and the answer of its row. "math" may raise or hang."""
    extract: Callable[[str], str | None]
    """The final answer of a completion as written, for display."""
    check_answer: Callable[[str], str]
    """Why the non-empty answer of a row cannot be used, or ""."""
    warm_up: Callable[[], object] = lambda: None
    """Imports the libraries that `is_correct` may use."""

    def answer_error(self, answer: str) -> str:
        """Why the answer of a row cannot be used, or ""."""
        if not exact_answer(answer):
            return (
                f"'answer' {_excerpt(answer)} has an empty final answer: add one or remove the row"
            )
        return self.check_answer(answer)


def _has_same_text(completion: str, answer: str) -> bool:
    return same_answer(exact_answer(completion), exact_answer(answer))


def _has_same_number(completion: str, answer: str) -> bool:
    candidate, number = last_number(completion), answer_number(answer)
    return candidate is not None and number is not None and same_number(candidate, number)


def _numeric_answer_error(answer: str) -> str:
    if answer_number(answer) is not None:
        return ""
    return (
        f"'answer' {_excerpt(answer)} is not one whole number: correct or remove the row, or set "
        "task.match = 'exact' or 'math'"
    )


def _excerpt(answer: str) -> str:
    return repr(answer if len(answer) <= 40 else "..." + answer[-37:])


MATCHING: dict[MatchKind, Matching] = {
    "exact": Matching(is_correct=_has_same_text, extract=final_answer, check_answer=lambda _: ""),
    "numeric": Matching(
        is_correct=_has_same_number,
        extract=last_number_text,
        check_answer=_numeric_answer_error,
    ),
    "math": Matching(
        is_correct=is_correct,
        extract=math_answer,
        check_answer=math_answer_error,
        warm_up=math_verify,
    ),
}


def matching(kind: MatchKind) -> Matching:
    # A function, so that scoring_source.py sees that a task uses this module.
    return MATCHING[kind]


class MatchedTask:
    """How a task with one value of `task.match` scores completions."""

    def __init__(self, match: MatchKind) -> None:
        self._matching = matching(match)

    def warm_up(self) -> None:
        self._matching.warm_up()

    def score(self, prompt: Prompt, completion: str) -> float:
        """1.0 when the completion's final answer matches, else 0.0. "math" may raise or hang."""
        return float(self._matching.is_correct(completion, prompt.answer))

    def extract(self, completion: str) -> str | None:
        """The final answer as written in the completion, whether it can be parsed or not."""
        return self._matching.extract(completion)
