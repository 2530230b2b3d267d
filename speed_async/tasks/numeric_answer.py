r"""The last number of a text, and when two numbers count as the same answer.

A reward that pays for wrong answers is found and exploited by the policy, so a number that is
only part of an expression (`2^99`, `\sqrt{2}`, `5 - 3`, `10-20`) is no answer: nothing here
evaluates. Units, currency and percent signs beside a number are ignored.
"""

import math
import re

from speed_async.tasks.final_answer import final_answer

RELATIVE_TOLERANCE = 1e-6
_CONTEXT = 64  # characters looked at on either side of a number
_MAX_DIGITS = 1000  # past this a literal is noise, and int() is slow or refuses

_NUMBER = r"(?:\d{1,3}(?:,\d{3}){1,30}(?![\d,])|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?"
_TOKEN = re.compile(rf"(?<![\w.]){_NUMBER}(?:\s*/\s*[-+]?{_NUMBER})?(?!\d|\.\d)")
_FRACTION = re.compile(rf"\\[dt]?frac\s*\{{\s*([-+]?{_NUMBER})\s*\}}\s*\{{\s*({_NUMBER})\s*\}}")
_EMPHASIS = re.compile(r"(?<![\w)*])(\*{1,2})(?=\S)([^*\n]+)\1(?![\w(*])")  # Markdown's
_TIMES = r"\u00d7\u00b7\u00f7"
_LATEX_TIMES = r"times|cdot|div|pm"
_OPERATOR_BEFORE = re.compile(
    rf"(?:[\^*/_{_TIMES}]|\\(?:{_LATEX_TIMES}|sqrt|log|ln|exp|sin|cos|tan|frac)\b)\s*[{{(]?\s*$"
)
_OPERATOR_AFTER = re.compile(
    rf"\s*[)}}]?\s*(?:[\^*/!{_TIMES}]|[-+]\s*[\d.(\\]|\\(?:{_LATEX_TIMES}|sqrt|pi)\b)"
)
_OPERAND = re.compile(r"[\w)}\]]")


def last_number(text: str) -> int | float | None:
    r"""The number that ends the final answer of `text`; None when there is none.

    Reads `1,234`, `1{,}234`, `-3.5`, `1.2e-3`, `3/4`, `\frac{3}{4}`, `\$5`. Integers stay exact.
    """
    text = _plain(final_answer(text))
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
    value = _value(token.group())
    return None if value is None else sign * value


def same_number(given: float, answer: float) -> bool:
    """Integers must be equal; otherwise a relative difference of 1e-6 is allowed."""
    if isinstance(given, int) and isinstance(answer, int):
        return given == answer
    return abs(given - answer) <= RELATIVE_TOLERANCE * abs(answer)


def _plain(text: str) -> str:
    text = text.replace("{,}", ",").replace("\\,", ",").replace("\\!", "").replace("\u2212", "-")
    text = text.replace("\\$", "").replace("$", "")
    return _EMPHASIS.sub(r"\2", _FRACTION.sub(r" \1/\2", text))


def _sign(before: str) -> int | None:
    """Sign of the number that `before` leads to; None when that number is an operand."""
    if _OPERATOR_BEFORE.search(before):
        return None
    stem = before.rstrip(" (")
    if not stem.endswith(("-", "+")):
        return 1
    sign = -1 if stem.endswith("-") else 1
    left = stem[:-1]
    last = left.rstrip(" ")[-1:]
    follows_operand = bool(_OPERAND.match(last))
    follows_word = last.isalpha() and left.endswith(" ") and stem == before  # `is -3`
    return sign if not follows_operand or follows_word else None


def _value(token: str) -> int | float | None:
    if len(token) > _MAX_DIGITS:
        return None
    numerator, _, denominator = token.replace(",", "").partition("/")
    if not denominator:
        is_integer = numerator.isdigit()
        value = int(numerator) if is_integer else float(numerator)
    elif float(denominator) == 0:
        return None
    else:
        value = float(numerator) / float(denominator)
    return value if math.isfinite(value) else None
