r"""Numeric matching of answers: the rules of `task.match = "numeric"`.

Ground truth, and the content of a completion's last `\boxed{}` or after its last `####`, must be
one whole number (whole_number.py). The answer of a completion without such a mark is its last
number, unless that is part of an expression (`2^99`, `\sqrt{2}`, `5 - 3`, `10-20`, `(3, 4)`,
`52_8`, `\frac{\pi}{6}`, `2k`): a policy exploits rewards for wrong answers. Expressions are not
evaluated. Units, currency and percent signs next to a number are ignored.
"""

import re

from speed_async.environments.final_answer import final_answer, marked_answer
from speed_async.environments.whole_number import literal_value, whole_number

RELATIVE_TOLERANCE = 1e-6
_CONTEXT = 64  # characters inspected on either side of a number
_MAX_DIGITS = 1000  # a longer literal is no answer

_NUMBER = r"(?:\d{1,3}(?:,\d{3}){1,30}(?![\d,])|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?"
_TOKEN = re.compile(rf"(?<![\w.]){_NUMBER}(?:\s*/\s*[-+]?{_NUMBER})?(?!\d|\.\d)")
_PART = rf"\s*(?:(\d)|\{{\s*([-+]?{_NUMBER})\s*\}})"
_FRACTION = re.compile(rf"([-+]?)\\[dt]?frac{_PART}{_PART}(?!\d)")
_TEXT = re.compile(r"\\(?:text|mbox|textbf|mathbf|mathrm|boldsymbol)\{([^{}]*)\}(?:\^\{?[23]\}?)?")
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\\circ\})")
_EMPHASIS = re.compile(r"(?<![\w)*])(\*{1,2})(?=\S)([^*\n]+)\1(?![\w(*])")  # Markdown's
_TIMES = r"\u00d7\u00b7\u00f7\u221a"
_POWERS = r"\u00b2\u00b3\u00b9\u2070-\u207f\u03c0\u00bc-\u00be\u2150-\u215e"  # also pi, fractions
_LATEX_TIMES = r"times|cdot|div|pm|mp"
_FUNCTIONS = r"sqrt|log|ln|exp|frac|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|leq?|geq?|neq?"
_SYMBOLS = r"sqrt|pi|theta|alpha|beta|gamma|lambda|mu|omega|phi|infty|log|ln|sin|cos|tan|frac"
_OPERATOR_BEFORE = re.compile(
    rf"(?:[\^*/_{_TIMES}]|\\(?:{_LATEX_TIMES}|{_FUNCTIONS}))\s*[{{(]?\s*$|\d:$|\}}$"
)
_ARGUMENT_BEFORE = re.compile(r"\{\s*[-+]?\s*$")
_OPERATOR_AFTER = re.compile(
    rf"\s*[)}}]?\s*(?:[\^*/!_{_TIMES}{_POWERS}]|[-+]\s*(?:[\d.(\\]|[A-Za-z](?![A-Za-z]))"
    rf"|\\(?:{_LATEX_TIMES}|{_SYMBOLS})(?![a-z])|\\end\{{[a-zA-Z]*(?:matrix|array))"
    r"|[A-Za-z](?![A-Za-z])"
)
# Between brackets: digits, single letters and LaTeX commands, but no words.
_INSIDE = r"(?:[^()\[\]A-Za-z\\]|\\[A-Za-z]+|\\[{}!,;: ]|[A-Za-z](?![A-Za-z]))*"
_TUPLE_BEFORE = re.compile(rf"[(\[{{]{_INSIDE},\s*[-+]?\s*$")
_OPENED_BEFORE = re.compile(r"[(\[{]\s*[-+]?\s*$")
_TUPLE_AFTER = re.compile(rf"\s*,{_INSIDE}\\?[)\]}}]")
_CLOSED_AFTER = re.compile(r"\s*\\?[)\]}]")
_WORD_BEFORE = re.compile(r"[A-Za-z]{2,} +$")
_OPERAND = re.compile(r"[\w)}\]]")


def answer_number(answer: str) -> int | float | None:
    """The number of the ground truth; None when it is not one whole number."""
    return whole_number(final_answer(answer))


def last_number(text: str) -> int | float | None:
    """The numeric answer of a completion; None when there is none."""
    marked = marked_answer(text)
    if marked is not None:
        return whole_number(marked)
    found = _last_in(_plain(text))
    return None if found is None else found[0]


def last_number_text(text: str) -> str | None:
    """The text that `last_number` parses, as written in the completion; for display."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    found = _last_in(_plain(text))
    return None if found is None else found[1]


def _last_in(text: str) -> tuple[int | float, str] | None:
    tokens = list(_TOKEN.finditer(text))
    if not tokens:
        return None
    token = tokens[-1]
    before = text[max(0, token.start() - _CONTEXT) : token.start()]
    after = text[token.end() : token.end() + _CONTEXT]
    sign = _sign(before)
    is_mixed = "/" in token.group() and before.rstrip()[-1:].isdigit()  # `1 1/2`
    if sign is None or is_mixed or _OPERATOR_AFTER.match(after):
        return None
    if _is_in_tuple(before, token.group(), after):
        return None
    value = _value(token.group())
    return None if value is None else (sign * value, "-" * (sign < 0) + token.group())


def _is_in_tuple(before: str, token: str, after: str) -> bool:
    if _TUPLE_BEFORE.search(before):
        return True
    if not _OPENED_BEFORE.search(before):
        return False
    return bool(_TUPLE_AFTER.match(after) or ("," in token and _CLOSED_AFTER.match(after)))


def same_number(candidate: float, answer: float) -> bool:
    """Integers must be equal; otherwise a relative difference of 1e-6 is allowed."""
    if isinstance(candidate, int) and isinstance(answer, int):
        return candidate == answer
    return abs(candidate - answer) <= RELATIVE_TOLERANCE * abs(answer)


def _plain(text: str) -> str:
    text = text.replace("{,}", ",").replace("\\,", ",").replace("\\!", "").replace("\u2212", "-")
    text = text.replace("\\$", "").replace("$", "")
    text = _DEGREES.sub(" ", _FRACTION.sub(_over, _TEXT.sub(r" \1 ", text)))
    return _EMPHASIS.sub(r"\2", text)


def _over(fraction: re.Match[str]) -> str:
    sign, top_digit, top, bottom_digit, bottom = fraction.groups()
    return f"{sign or ' '}{top_digit or top}/{bottom_digit or bottom}"


def _sign(before: str) -> int | None:
    """Sign of the number that follows `before`; None when that number is an operand."""
    if _OPERATOR_BEFORE.search(before) or _ARGUMENT_BEFORE.search(before):
        return None
    stem = before.rstrip(" (")
    if not stem.endswith(("-", "+")):
        return 1
    sign = -1 if stem.endswith("-") else 1
    left = stem[:-1]
    last = left.rstrip(" ")[-1:]
    follows_operand = bool(_OPERAND.match(last))
    follows_word = bool(_WORD_BEFORE.search(left)) and stem == before  # `is -3`
    return sign if not follows_operand or follows_word else None


def _value(token: str) -> int | float | None:
    numerator, _, denominator = token.partition("/")
    return None if len(token) > _MAX_DIGITS else literal_value(numerator, denominator or "1")
