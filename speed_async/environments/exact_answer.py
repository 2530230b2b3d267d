r"""Text matching of answers: the rules of `task.match = "exact"`.

Two answers match when one of these rules holds, in this order; two empty answers never match.

1. Both are decimal numbers of the same value: 27 = 27.0 = 027, 1,000 = 1000, .5 = 0.50.
2. They are the same text after this normalisation:
   - `$`, `\$`, `\left`, `\right` and LaTeX spacing (`\!`, `\,`, `\;`, `\:`, `\ `, `~`) are removed;
   - `\dfrac`, `\tfrac` and `\cfrac` become `\frac`; `\frac12` and `\frac 12` become `\frac{1}{2}`;
   - `\text{...}`, `\mbox{...}`, `\textbf{...}`, `\mathrm{...}`, `\mathbf{...}` are unwrapped;
   - braces around a single letter, digit or command after `^` or `_` are removed;
   - white space is removed, except one space between two letters or digits;
   - a trailing period is removed.

Matching is case-sensitive. Expressions are not evaluated: `1/2`, `0.5` and `\frac{1}{2}` differ.
"""

import re
from fractions import Fraction

from speed_async.environments.final_answer import final_answer

_DECIMAL = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
_MAX_DIGITS = 1000
_IGNORED = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\?\$")
_SPACING = re.compile(r"\\[!,;: ]|~")
_FRAC = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_SHORT_FRAC = re.compile(r"\\frac\s*(?:(\w)|\{([^{}]*)\})\s*(?:(\w)|\{([^{}]*)\})")
_WRAPPER = re.compile(r"\\(?:text|mbox|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_SCRIPT = re.compile(r"([\^_])\s*\{\s*(\\[A-Za-z]+|\w)\s*\}")
_SPACE = re.compile(r"(?<![^\W_])\s+|\s+(?![^\W_])")


def exact_answer(text: str) -> str:
    """The final answer of `text`, normalised; empty when there is none."""
    answer = final_answer(text)
    return normalised(answer) or answer


def same_answer(candidate: str, answer: str) -> bool:
    """Whether two normalised answers match."""
    if not candidate or not answer:
        return False
    if _is_decimal(candidate) and _is_decimal(answer):
        return _value(candidate) == _value(answer)
    return candidate == answer


def normalised(text: str) -> str:
    """`text` after the normalisation of rule 2."""
    text = _SPACING.sub(" ", _IGNORED.sub("", text))
    text = _SHORT_FRAC.sub(_braced, _FRAC.sub(r"\\frac", text))
    text = _SCRIPT.sub(r"\1\2", _WRAPPER.sub(r"\1", text))
    text = _SPACE.sub("", " ".join(text.split()))
    return text.removesuffix(".")


def _braced(fraction: re.Match[str]) -> str:
    top_digit, top, bottom_digit, bottom = fraction.groups()
    return f"\\frac{{{top_digit or top}}}{{{bottom_digit or bottom}}}"


def _is_decimal(text: str) -> bool:
    return len(text) <= _MAX_DIGITS and _DECIMAL.fullmatch(text) is not None


def _value(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))
