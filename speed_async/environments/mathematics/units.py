r"""Splits the unit from a number, and converts units of one dimension into one another.

A missing unit is accepted: `90^\circ` = `90`. Two units of the table must have the same dimension:
`5 cm` = `50 mm`, but not `5 m`. A word that is no unit of the table is a label and is ignored:
`21 dogs` = `21`. A percent sign is a factor: `50\%` = `0.5`, and not `50`.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from speed_async.environments.mathematics.expression import Unreadable
from speed_async.environments.whole_number import CHANGES_VALUE

MAX_PARTS = 6
"""Words, text commands and signs of one unit."""

_INCH = Fraction("0.0254")
_POUND = Fraction("453.59237")
_TABLE: dict[str, tuple[str, Fraction | int]] = {
    "mm millimeter millimetre": ("length", Fraction(1, 1000)),
    "cm centimeter centimetre": ("length", Fraction(1, 100)),
    "m meter metre": ("length", 1),
    "km kilometer kilometre": ("length", 1000),
    "in inch inche": ("length", _INCH),
    "ft foot feet": ("length", 12 * _INCH),
    "yd yard": ("length", 36 * _INCH),
    "mi mile": ("length", 63360 * _INCH),
    "sec second": ("time", 1),
    "min minute": ("time", 60),
    "hr h hour": ("time", 3600),
    "day": ("time", 86400),
    "week": ("time", 604800),
    "month": ("months", 1),
    "year": ("months", 12),
    "mg milligram": ("mass", Fraction(1, 1000)),
    "g gram": ("mass", 1),
    "kg kilogram": ("mass", 1000),
    "oz ounce": ("mass", _POUND / 16),
    "lb pound": ("mass", _POUND),
    "ml mL milliliter millilitre": ("volume", Fraction(1, 1000)),
    "l L liter litre": ("volume", 1),
    "dollar USD": ("money", 1),
    "cent": ("money", Fraction(1, 100)),
    "degree \\circ": ("angle", 1),
    "mph": ("miles per hour", 1),
    "km/h kmh kph": ("kilometers per hour", 1),
    "m/s": ("meters per second", 1),
}
_UNITS = {name: value for names, value in _TABLE.items() for name in names.split()}

_TEXT = re.compile(
    r"\s*\\(?:text|mbox|textnormal|textrm|mathrm|rm)\s*\{([A-Za-z./\s]+)\}\s*(?:\^\s*\{?([23])\}?)?\.?\s*$"
)
_DEGREES = re.compile(r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree)\s*$")
_PERCENT = re.compile(r"\s*(?:\\?%|(?:\\text\s*\{)?\s*percent\s*\}?)\s*$")
_SHORT = "|".join(sorted((each for each in _UNITS if len(each) == 2 or "/" in each), key=len))
_WORD = re.compile(
    rf"(?<![A-Za-z\\_^{{])([A-Za-z]{{3,}}|{_SHORT})\s*(?:\^\s*\{{?([23])\}}?)?\.?\s*$"
)
_NOT_WORDS = re.compile(r"(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|exp|sqrt")
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


@dataclass(frozen=True, slots=True)
class Unit:
    dimension: str
    factor: Fraction
    """Value in the base unit of the dimension."""


def split_unit(text: str) -> tuple[str, Fraction, Unit | None]:
    """The text without its unit, a factor (1/100 for percent), and the unit if it is known.

    Raises Unreadable when a word changes the value (`million`).
    """
    factor = Fraction(1)
    words: list[tuple[str, int]] = []
    for _ in range(MAX_PARTS):
        if (sign := _PERCENT.search(text)) is not None:
            factor /= 100
        elif (sign := _DEGREES.search(text)) is not None:
            words.insert(0, ("\\circ", 1))
        elif (sign := _TEXT.search(text)) is not None or (sign := _word(text)) is not None:
            exponent = int(sign[2] or 1)
            words[:0] = [(word, exponent) for word in sign[1].split()]
        else:
            break
        text = text[: sign.start()]
    if factor not in (1, Fraction(1, 100)):
        raise Unreadable
    return text.strip(), factor, _unit(words)


def _word(text: str) -> re.Match[str] | None:
    word = _WORD.search(text)
    return None if word is None or _NOT_WORDS.fullmatch(word[1]) else word


def _unit(words: list[tuple[str, int]]) -> Unit | None:
    if CHANGES_VALUE.search(" ".join(word for word, _ in words if word not in _POWERS)):
        raise Unreadable
    exponent = max((_POWERS.get(word, 1) for word, _ in words), default=1)
    known = [
        (_UNITS[name], power)
        for word, power in words
        if (name := _singular(word)) in _UNITS or (name := name.lower()) in _UNITS
    ]
    if len(known) != 1:
        return None
    (dimension, factor), power = known[0]
    exponent = max(exponent, power)
    return Unit(f"{dimension}^{exponent}", Fraction(factor) ** exponent)


def _singular(word: str) -> str:
    word = word.removesuffix(".")
    return word.removesuffix("s") if len(word) > 3 else word
