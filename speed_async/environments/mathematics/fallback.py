r"""Asks math-verify about two expressions that the exact path cannot read, such as `\cot x`.

It may raise or hang: call it in the verifier pool, which kills and replaces the process. Its own
timeouts use SIGALRM, work only in the main thread and do not reclaim the process; they are off.

It is not asked, and the answers differ, where it is known to be wrong:

- anything but letters, digits, brackets and operators: `5'` is 5 to it;
- words: `\text{east}` and `\text{seat}` are the same product of letters to it;
- relations: it reduces two different equations to 0;
- percent signs, and answers whose brackets or numbers of items differ: `(1,2)` is `\{1,2\}` to it;
- numbers in another base (`40_0`), and what may be too large to evaluate.
"""

import logging
import re
from functools import lru_cache
from types import ModuleType

from speed_async.environments.mathematics.text import clean, enclosing, split_outside

MAX_CHARS = 300
FLOAT_DECIMALS = 12
"""math-verify compares decimals after rounding; its default is 6."""

_COMMA = re.compile(r"[,;]")
_RELATION = re.compile(r"\\(?:leq?|geq?|neq?|lt|gt|in|approx|equiv|sim)(?![A-Za-z])")
_WORD = re.compile(r"\\(?:text|mbox)|(?<![A-Za-z\\])[A-Za-z]{4,}")
_KNOWN_WORDS = re.compile(r"(?<![A-Za-z\\])(?:sqrt|arc(?:sin|cos|tan))(?![A-Za-z])")
_FOREIGN = re.compile(r"[^A-Za-z0-9\s\\{}()\[\].,;+*/^_|!-]")
_LARGE = re.compile(
    r"\d{20}|\d\s*_|\^\s*\{?\s*-?\d{4}|\d{4}\s*!|!\s*!|[)}]\s*!"
    r"|\^\s*\{[^{}]{0,30}\^\s*\{[^{}]{0,30}\^|\d[)}]*\s*\^\s*[{(]*\s*\d+[)}]*\s*\^"
    r"|\\(?:binom|sum|prod|int|lim)(?![A-Za-z])"
)


def is_askable(candidate: str, answer: str) -> bool:
    """Whether math-verify is asked; if not, the answers differ."""
    left, right = clean(candidate), clean(answer)
    return _is_expression(left) and _is_expression(right) and _shape(left) == _shape(right)


def fallback_verdict(candidate: str, answer: str) -> bool:
    """Whether math-verify calls the answers equal. May raise anything, or never return."""
    module = math_verify()
    gold, target = (_parsed(module, text) for text in (answer, candidate))
    if gold is None or target is None:
        return False
    return module.verify(
        gold, target, float_rounding=FLOAT_DECIMALS, timeout_seconds=None, raise_on_error=True
    )


def _is_expression(text: str) -> bool:
    refused = (_FOREIGN, _RELATION, _LARGE)
    if len(text) > MAX_CHARS or any(pattern.search(text) for pattern in refused):
        return False
    return _WORD.search(_KNOWN_WORDS.sub("", text)) is None


def _shape(text: str) -> tuple[tuple[str, str] | None, int]:
    brackets = enclosing(text)
    inside = text if brackets is None else text[len(brackets[0]) : -len(brackets[1])]
    return brackets, len(split_outside(inside, _COMMA))


def _parsed(module: ModuleType, text: str) -> object | None:
    """The expression in a box, so that no other rule of extraction applies; None if unreadable."""
    config = module.LatexExtractionConfig(boxed_match_priority=0)
    expressions = module.parse(
        f"\\boxed{{{text}}}",
        extraction_config=[config],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
        raise_on_error=True,
    )
    return expressions[0] if expressions else None


@lru_cache(maxsize=1)
def math_verify() -> ModuleType:
    """The library. The first call imports it, with sympy, which takes a second of CPU."""
    import math_verify

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it warns that its timeouts are off
    return math_verify
