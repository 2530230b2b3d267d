"""The words of a problem: the forms in which problems are compared."""

import re
import unicodedata
from collections.abc import Sequence

import xxhash

_SPACING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|text|mathrm|[,;:! ])(?![a-z])")
_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL | re.IGNORECASE)
_FRACTION = re.compile(r"\\[dtc]frac(?![a-z])")
_PLAIN_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")  # a Chinese character is a word
_WORD = re.compile(_PLAIN_WORD.pattern + r"|[-+*/=<>^!|]")


def digest(text: str) -> int:
    """A 128-bit hash, equal for equal texts only (up to a chance of about 1e-27 in a million)."""
    return xxhash.xxh3_128_intdigest(text.encode("utf-8", "surrogatepass"))


def normalised_text(problem: str) -> str:
    """Words, numbers and operators in lower case; two problems with equal ones are the same.

    Case, white space, punctuation, brackets, dollar signs and LaTeX spacing make no difference.
    """
    text = unicodedata.normalize("NFKC", problem).lower()
    return " ".join(_WORD.findall(_FRACTION.sub(r"\\frac", _SPACING.sub(" ", text))))


def plain_words(problem: str) -> list[str]:
    """Words and numbers in lower case, without punctuation, operators and Asymptote drawings."""
    text = unicodedata.normalize("NFKC", _DRAWING.sub(" ", problem)).lower()
    return _PLAIN_WORD.findall(text)


def ngrams(words: Sequence[str], size: int) -> set[str]:
    """All distinct runs of `size` words; all words together when there are fewer."""
    if len(words) <= size:
        return {" ".join(words)}
    return {" ".join(words[start : start + size]) for start in range(len(words) - size + 1)}
