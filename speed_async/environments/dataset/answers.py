r"""Normalises the answer of a row: 27.0 is 27, 1,234 is 1234, `$\frac{1}{2}$` is `\frac{1}{2}`."""

import math
import re

from speed_async.environments.final_answer import final_answer, marked_answer

_DELIMITED = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
_INTEGER = re.compile(r"([+-]?)0*(\d+)(?:\.0+)?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:(?:,|\{,\}|,\\!|\\,)\d{3})+(?:\.\d+)?")
_SEPARATOR = re.compile(r"\{,\}|,\\!|\\,|,")


class AnswerError(Exception):
    """Why a value is no answer."""


def answer_text(value: object) -> str:
    r"""The normalised final answer of a value: a number, or a text that is or states the answer.

    A text may end in `#### N` (GSM8K) or state its answer in the last `\boxed{}`. A list of one
    value counts as that value. Raises AnswerError.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    text = normalised_answer(final_answer(_plain(value)))
    if not text:
        raise AnswerError("the answer is empty")
    return text


def solution_answer(value: object) -> str:
    r"""The normalised answer that a solution states: its last `\boxed{}`, else after `####`.

    Raises AnswerError when it states none.
    """
    marked = marked_answer(_plain(value))
    if marked is None:
        raise AnswerError("the solution has no \\boxed{} and no ####")
    text = normalised_answer(marked)
    if not text:
        raise AnswerError("the answer is empty")
    return text


def normalised_answer(text: str) -> str:
    """An answer in one notation: integers without separators, leading zeros and `.0`.

    Everything else keeps its LaTeX, without delimiters of mathematics around all of it.
    """
    text = text.strip()
    delimited = _DELIMITED.fullmatch(text)
    if delimited is not None:
        text = next(part for part in delimited.groups() if part is not None).strip()
    plain = text.removesuffix(".") if text[-2:-1].isdigit() else text
    if _THOUSANDS.fullmatch(plain):
        plain = _SEPARATOR.sub("", plain)
    integer = _INTEGER.fullmatch(plain)
    if integer is None:
        return plain
    sign = "-" if integer[1] == "-" and integer[2] != "0" else ""
    return sign + integer[2]


def is_integer(answer: str) -> bool:
    """Whether a normalised answer is an integer."""
    return _INTEGER.fullmatch(answer) is not None


def number_text(value: int | float) -> str:
    """A finite number as text. An integral float is an integer (18.0 is 18, -0.0 is 0), unless it
    is too large to be exact."""
    is_exact_integer = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return str(int(value) if is_exact_integer else value)


def is_encodable(text: str) -> bool:
    """False for a text with a lone surrogate, which JSON allows but UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: object) -> str:
    """Raises AnswerError for a value that is neither a text nor a number."""
    if isinstance(value, str):
        if not is_encodable(value):
            raise AnswerError("the answer contains a lone surrogate")
        return value
    if value is None:
        raise AnswerError("the answer is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AnswerError(f"the answer is a {type(value).__name__}, not a text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise AnswerError("the answer is not a finite number")
    return number_text(value)
