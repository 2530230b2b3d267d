"""The `jsonl` task: prompts and answers from a file, matched as text, numbers or mathematics."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from speed_async.environments.exact_answer import exact_answer, same_answer
from speed_async.environments.final_answer import final_answer
from speed_async.environments.jsonl_file import DataRow, read_rows
from speed_async.environments.mathematics.extraction import math_answer
from speed_async.environments.mathematics.scoring import is_correct, math_answer_error
from speed_async.environments.numeric_answer import (
    answer_number,
    last_number,
    last_number_text,
    same_number,
)
from speed_async.errors import ConfigError, DataError
from speed_async.types import Prompt

MIN_TRAIN_PROMPTS = 2

MatchKind = Literal["exact", "numeric", "math"]


class JsonlTask:
    r"""One object per line: `prompt` (string), `answer` (string or number), other keys as metadata.

    Match "exact" compares texts (rules: exact_answer.py), "numeric" compares numbers
    (numeric_answer.py), "math" compares mathematical values (mathematics/). All extract the final
    answer of answer and completion from the last `\boxed{}`, else from after the last `####`. The
    held-out prompts are sampled with the seed.
    """

    def __init__(self, *, path: str, match: MatchKind, num_held_out: int, seed: int) -> None:
        """Raises DataError (unusable file) or ConfigError (too many held-out prompts)."""
        self._matching = _MATCHING[match]
        rows = read_rows(Path(path), self._answer_error)
        _check_size(path, len(rows), num_held_out)
        selected = set(random.Random(seed).sample(range(len(rows)), num_held_out))
        train = [row for index, row in enumerate(rows) if index not in selected]
        held_out = [row for index, row in enumerate(rows) if index in selected]
        self.train_prompts = [_prompt(index, row, False) for index, row in enumerate(train)]
        self.held_out_prompts = [_prompt(index, row, True) for index, row in enumerate(held_out)]

    def score(self, prompt: Prompt, completion: str) -> float:
        """1.0 when the completion's final answer matches, else 0.0. "math" may raise or hang."""
        return float(self._matching.is_correct(completion, prompt.answer))

    def extract(self, completion: str) -> str | None:
        """The final answer as written in the completion, whether it can be parsed or not."""
        return self._matching.extract(completion)

    def _answer_error(self, answer: str) -> str:
        """Why a row's answer cannot be used, or ""."""
        if not exact_answer(answer):
            return (
                f"'answer' {_excerpt(answer)} has an empty final answer: add one or remove the row"
            )
        return self._matching.answer_error(answer)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Matching:
    """One value of `task.match`."""

    is_correct: Callable[[str, str], bool]
    """Of a completion and the answer of its row."""
    extract: Callable[[str], str | None]
    """The final answer of a completion, for display."""
    answer_error: Callable[[str], str]
    """Why the non-empty answer of a row cannot be used, or ""."""


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


_MATCHING: dict[MatchKind, _Matching] = {
    "exact": _Matching(is_correct=_has_same_text, extract=final_answer, answer_error=lambda _: ""),
    "numeric": _Matching(
        is_correct=_has_same_number,
        extract=last_number_text,
        answer_error=_numeric_answer_error,
    ),
    "math": _Matching(is_correct=is_correct, extract=math_answer, answer_error=math_answer_error),
}


def _excerpt(answer: str) -> str:
    return repr(answer if len(answer) <= 40 else "..." + answer[-37:])


def _check_size(path: str, num_rows: int, num_held_out: int) -> None:
    if num_rows <= MIN_TRAIN_PROMPTS:
        raise DataError(
            f"data file '{path}' has {num_rows} distinct prompts: at least "
            f"{MIN_TRAIN_PROMPTS + 1} are required ({MIN_TRAIN_PROMPTS} to train on and 1 held out)"
        )
    most = num_rows - MIN_TRAIN_PROMPTS
    if num_held_out > most:
        raise ConfigError(
            "task.num_held_out",
            num_held_out,
            f"'{path}' has {num_rows} distinct prompts; set it to {most} or less, "
            "or add prompts to the file",
        )


def _prompt(index: int, row: DataRow, held_out: bool) -> Prompt:
    level = row.extra.get("level", "")
    return Prompt(
        prompt_id=index,
        text=row.prompt,
        answer=row.answer,
        level=str(level) if isinstance(level, str | int | float) else "",
        held_out=held_out,
        metadata=row.extra,
    )
