r"""Parses a text that consists of exactly one number, such as ground truth.

A number is an optional sign and one of:

- digits, with or without a decimal part and thousands separators: `12`, `.5`, `1,234.5`,
  `1{,}234`, `10,\!080`, `10\,080`
- a fraction of two such numbers: `3/4`, `\frac{3}{4}`, `\dfrac34`, `\frac 34`
- scientific notation: `1.2e-3`, `1.2 \times 10^{-3}`

Ignored around the number: white space, `$` and `\(` of LaTeX, emphasis (`**5**`, `\textbf{5}`), a
trailing period, a currency sign, a percent sign, a degree sign, and a unit: words of three letters
or more (`72 clips`), common short units (`5 cm`), or LaTeX text (`5\text{ m}^2`). A word that
changes the value (`million`, `dozen`, `pi`) is not a unit.

Everything else is rejected: pairs, lists, intervals, equations (`x=5`), variables (`2k`), roots,
`\pi`, powers, number bases (`52_8`), mixed numbers (`1\frac{1}{2}`), times (`4:51`), brackets.
"""

import re
from fractions import Fraction

MAX_CHARS = 1000
"""Longer texts are rejected."""
MAX_EXPONENT = 300

_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_POWER = r"\s*(?:\\times|\\cdot|\u00d7)\s*10\s*\^\s*(?:\{\s*([-+]?\d{1,3})\s*\}|([-+]?\d{1,3}))"
_PART = rf"\s*(?:(\d)|\{{\s*([-+]?{_DECIMAL})\s*\}})"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:\\[dtc]?frac{_PART}{_PART}"
    rf"|({_DECIMAL})\s*/\s*({_DECIMAL})"
    rf"|({_DECIMAL})(?:[eE]([-+]?\d{{1,3}})|{_POWER})?)"
)
_SHORT_UNITS = "mm|cm|km|mg|kg|ml|mL|ft|yd|mi|lb|oz|hr|km/h|m/s"
_LATEX_TEXT = r"\\(?:text|mbox|textrm|mathrm|rm)"
_UNIT = re.compile(
    rf"(?:\s*\\?%|\s*\^\s*(?:\\circ|\{{\s*\\circ\s*\}})|\s*\u00b0|\s*\\degree"
    rf"|\s*(?:{_SHORT_UNITS})(?![A-Za-z])(?:\^[23])?"
    rf"|\s*{_LATEX_TEXT}\s*\{{[A-Za-z./\s]+\}}(?:\s*\^\s*\{{?[23]\}}?)?"
    r"|\s+[A-Za-z]{3,}\.?(?:\^[23])?){0,6}\s*"
)
CHANGES_VALUE = re.compile(
    r"(?i)(?<![a-z])(?:hundreds?|thousands?|[mb]illions?|trillions?|dozens?|gross|score|lakh|crore"
    r"|half|halves|thirds?|quarters?|pi|infinity|squared|cubed|factorial|root|power|times|plus|minus"
    r"|over|mod|modulo|base|choose|remainder|and|or|to|abcd?|xyz|pqr|rst|uvw)(?![a-z])"
)
_WRAPPED = re.compile(
    r"(?:\*\*([^*]+)\*\*|\*([^*]+)\*"
    r"|\\(?:text|mbox|textbf|textit|mathbf|mathrm|boldsymbol|bm)\s*\{([^{}]*)\})(\.?)"
)
_THIN_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|,\\!\s*|\\,(?=\d{3}(?!\d)))(?=\d)")
_SPACE = re.compile(r"\\[,;: ]|~|\\\$|[$\u20ac\u00a3\u00a5]|\\[()\[\]]")


def whole_number(text: str) -> int | float | None:
    """The number that `text` consists of, without its unit; None otherwise.

    Numbers without a fractional part are returned as exact integers.
    """
    if len(text) > MAX_CHARS:
        return None
    text = _strip_markup(text)
    match = _NUMBER.match(text)
    if match is None or not _is_unit(text[match.end() :]):
        return None
    top_digit, top, bottom_digit, bottom, left, right, literal, *exponents = match.groups()[1:]
    exponent = next((int(each) for each in exponents if each), 0)
    numerator = top_digit or top or left or literal
    value = literal_value(numerator, bottom_digit or bottom or right or "1", exponent)
    return -value if value is not None and match["sign"] == "-" else value


def literal_value(numerator: str, denominator: str = "1", exponent: int = 0) -> int | float | None:
    """Value of a fraction of decimal literals (`1,234.5e3`); None when it is not finite."""
    try:
        value = _exact(numerator) * _power_of_ten(exponent) / _exact(denominator)
        return int(value) if value.denominator == 1 else float(value)
    except (ValueError, ArithmeticError):  # too many digits, too large, or division by zero
        return None


def _exact(literal: str) -> Fraction:
    digits, _, exponent = literal.replace(",", "").lower().partition("e")
    return Fraction(digits) * _power_of_ten(int(exponent or 0))


def _power_of_ten(exponent: int) -> Fraction:
    if abs(exponent) > MAX_EXPONENT:
        raise OverflowError(exponent)
    return Fraction(10) ** exponent


def _strip_markup(text: str) -> str:
    text = text.replace("\u2212", "-")
    text = _THIN_SEPARATOR.sub(",", text).replace("\\!", "")
    text = _SPACE.sub(" ", text).strip()
    while (wrapped := _WRAPPED.fullmatch(text)) is not None:
        text = next(part for part in wrapped.groups()[:3] if part is not None).strip()
    return text.removesuffix(".").rstrip()


def _is_unit(text: str) -> bool:
    return _UNIT.fullmatch(text) is not None and CHANGES_VALUE.search(text) is None
