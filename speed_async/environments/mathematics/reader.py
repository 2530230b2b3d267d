"""Reads clean text (text.py) as one of the forms (forms.py)."""

import re
from fractions import Fraction

from speed_async.environments.mathematics.expression import (
    TooLarge,
    Unreadable,
    add,
    constant,
    is_polynomial,
    multiply,
    negate,
    same_value,
    symbol,
    symbols,
)
from speed_async.environments.mathematics.forms import (
    Form,
    Matrix,
    Named,
    Numeral,
    Ordered,
    Scalar,
    Unordered,
    Words,
)
from speed_async.environments.mathematics.parser import read_expression
from speed_async.environments.mathematics.text import (
    enclosing,
    is_words,
    split_outside,
    words_in,
)
from speed_async.environments.mathematics.units import split_unit

MAX_ITEMS = 100
MAX_DEPTH = 10
"""Nested brackets of sets, tuples and intervals."""


_UNION = re.compile(r"\\cup(?![A-Za-z])")
_COMMA = re.compile(r",|;|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_MEMBER = re.compile(r"\\in(?![A-Za-z])")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_COLON = re.compile(r":")
_RELATION = re.compile(r"<=|>=|\\(?:leq?|geq?|leqslant|geqslant|lt|gt)(?![A-Za-z])|[<>=]")
_MATRIX = re.compile(r"\\begin\{([pb]matrix)\}(.*)\\end\{\1\}")
_DECIMAL = re.compile(r"-?(?:\d{1,100}(?:\.\d{0,100})?|\.\d{1,100})")
_NUMERAL = re.compile(r"(-?\d[0-9A-F]*|\(\d[0-9A-F]*\))_\{?(\d+)\}?")
_NAME = re.compile(
    r"(?:m?\\angle )?(?:[A-Z]{2,4}|\\?[A-Za-z]+)(?:'|_\w|_\{\w+\})?(?:\([A-Za-z](?:,[A-Za-z])*\))?"
    r"|\([A-Za-z](?:,[A-Za-z])+\)"
)
_STRICT = ("<", ">", "\\lt", "\\gt")


def read_form(text: str, depth: int = 0) -> Form:
    """`text` is clean (text.py). Raises Unreadable or TooLarge."""
    if depth > MAX_DEPTH:
        raise TooLarge
    if _DECIMAL.fullmatch(text) is not None:  # most answers
        return Scalar(constant(Fraction(text)))
    if is_words(text):
        words = words_in(text) or ""
        number = _NUMBER_WORDS.get(words)
        return Words(words) if number is None else Scalar(constant(number))
    for read in (_member, _union, _named, _matrix, _items, _enclosed, _ratio):
        form = read(text, depth)
        if form is not None:
            return form
    return _scalar(text)


_NUMBER_WORDS = {
    "zero": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
}


def _union(text: str, depth: int) -> Form | None:
    parts = split_outside(text, _UNION)
    if len(parts) == 1:
        return None
    return Unordered(_read_all([part for part, _ in parts], depth), "union")


def _items(text: str, depth: int) -> Form | None:
    parts = split_outside(text, _COMMA)
    if len(parts) == 1 and (_PLUS_MINUS.search(text) is None or enclosing(text) is not None):
        return None
    items = _read_all([part for part, _ in parts], depth)
    inequalities = [item for item in items if isinstance(item, Named) and _is_interval(item.value)]
    if inequalities:  # `x < 1 or x > 3` is a union; `x > 1 and x < 3` would be an intersection
        separators = {separator for _, separator in parts[1:]}
        names = {item.name for item in inequalities}
        if separators != {"or"} or len(names) != 1 or len(inequalities) != len(items):
            raise Unreadable
        return Named(names.pop(), Unordered(_without_names(items), "union"), None)
    return items[0] if len(items) == 1 else Unordered(_without_names(items), "list")


def _is_interval(form: Form | None) -> bool:
    return isinstance(form, Ordered) and form.opening in "[(" and len(form.items) == 2


def _read_all(parts: list[str], depth: int) -> tuple[Form, ...]:
    """Forms of the parts that are not empty; `1 \\pm x` is two."""
    items: list[Form] = []
    for part in filter(None, parts):
        if _PLUS_MINUS.search(part) is not None and enclosing(part) is None:
            upper = part.replace("\\pm", "+").replace("\\mp", "-")
            lower = part.replace("\\pm", "-").replace("\\mp", "+")
            items += [read_form(upper, depth + 1), read_form(lower, depth + 1)]
        else:
            items.append(read_form(part, depth + 1))
    if len(items) > MAX_ITEMS:
        raise TooLarge
    return tuple(items)


def _without_names(items: tuple[Form, ...]) -> tuple[Form, ...]:
    """`x = 1, x = 2` and `x = 1, 2` are the list of the values of x."""
    names = {item.name for item in items if isinstance(item, Named)}
    if len(names) != 1 or None in names or not isinstance(items[0], Named):
        return items
    values = [item.value if isinstance(item, Named) else item for item in items]
    known = tuple(value for value in values if value is not None)
    return known if len(known) == len(items) else items


def _enclosed(text: str, depth: int) -> Form | None:
    brackets = enclosing(text)
    if brackets is None:
        return None
    opening, closing = brackets
    inside = text[len(opening) : -len(closing)].strip()
    if (opening, closing) == ("{", "}"):
        return read_form(inside, depth + 1)
    parts = [part for part, _ in split_outside(inside, _COMMA)]
    if (opening, closing) == ("\\{", "\\}"):
        return Unordered(_without_names(_read_all(parts, depth)), "list")
    if (opening, closing) == ("(", ")") and len(parts) == 1 and parts[0]:
        return read_form(inside, depth + 1)
    if not all(parts):
        raise Unreadable
    return Ordered(opening, closing, tuple(read_form(part, depth + 1) for part in parts))


def _ratio(text: str, depth: int) -> Form | None:
    parts = [part for part, _ in split_outside(text, _COLON)]
    if len(parts) == 1:
        return None
    return Ordered(":", ":", tuple(read_form(part, depth + 1) for part in parts))


def _matrix(text: str, depth: int) -> Form | None:
    matrix = _MATRIX.fullmatch(text)
    if matrix is None:
        return None
    rows = [row.split("&") for row in matrix[2].strip("\u00b6 ").split("\u00b6")]
    if len({len(row) for row in rows}) != 1 or sum(map(len, rows)) > MAX_ITEMS:
        raise Unreadable
    return Matrix(tuple(tuple(read_form(each.strip(), depth + 1) for each in row) for row in rows))


def _member(text: str, depth: int) -> Form | None:
    parts = split_outside(text, _MEMBER)
    if len(parts) != 2 or _NAME.fullmatch(parts[0][0]) is None:
        return None
    return Named(parts[0][0], read_form(parts[1][0], depth + 1), None)


def _named(text: str, depth: int) -> Form | None:
    parts = split_outside(text, _RELATION)
    if len(parts) == 1 or len(split_outside(text, _COMMA)) > 1:
        return None
    sides = [side for side, _ in parts]
    relations = [relation for _, relation in parts[1:]]
    if not all(sides) or len(sides) > MAX_DEPTH:
        raise Unreadable
    if set(relations) == {"="}:
        return _equation(sides, depth)
    return _inequality(sides, relations, depth)


def _equation(sides: list[str], depth: int) -> Form:
    if _NAME.fullmatch(sides[0]) is None and _NAME.fullmatch(sides[-1]) is not None:
        sides = sides[::-1]
    name = sides[0] if _NAME.fullmatch(sides[0]) else None
    forms = [_read_or_none(side, depth) for side in sides]
    values = [form.value for form in forms if isinstance(form, Scalar) and form.unit is None]
    all_read = len(values) == len(sides)
    if len(sides) > 2 or (all_read and not any(symbols(value) for value in values)):
        # `x = 2 + 3 = 5` or `2 + 3 = 5`: every side must have the same value.
        chain = values if name is None else values[1:]
        if not all_read or not all(same_value(chain[0], each) for each in chain):
            raise Unreadable
        return Scalar(chain[-1]) if name is None else Named(name, Scalar(chain[-1]), None)
    equation = None
    if len(values) == 2 and is_polynomial(difference := add(values[0], negate(values[1]))):
        equation = difference
    value = forms[-1] if name is not None else None
    if value is None and equation is None:
        raise Unreadable
    return Named(name, value, equation)


def _read_or_none(text: str, depth: int) -> Form | None:
    try:
        return read_form(text, depth + 1)
    except Unreadable:
        return None


def _inequality(sides: list[str], relations: list[str], depth: int) -> Form:
    """`a < x <= b` as the interval (a, b] of x."""
    if any(each in (">", ">=", "\\gt") or each.startswith("\\ge") for each in relations):
        sides, relations = sides[::-1], relations[::-1]
        relations = [_REVERSED.get(each, "") for each in relations]
    if not all(each in _LESS for each in relations):
        raise Unreadable
    infinity = symbol("\\infty")
    lower: Form = Scalar(negate(infinity))
    upper: Form = Scalar(infinity)
    opening, closing = "(", ")"
    if len(sides) == 3 and _NAME.fullmatch(sides[1]):
        name = sides[1]
        lower, upper = read_form(sides[0], depth + 1), read_form(sides[2], depth + 1)
        opening = "(" if relations[0] in _STRICT else "["
        closing = ")" if relations[1] in _STRICT else "]"
    elif len(sides) == 2 and _NAME.fullmatch(sides[0]):
        name, upper = sides[0], read_form(sides[1], depth + 1)
        closing = ")" if relations[0] in _STRICT else "]"
    elif len(sides) == 2 and _NAME.fullmatch(sides[1]):
        name, lower = sides[1], read_form(sides[0], depth + 1)
        opening = "(" if relations[0] in _STRICT else "["
    else:
        raise Unreadable
    return Named(name, Ordered(opening, closing, (lower, upper)), None)


_REVERSED = {
    ">": "<",
    "\\gt": "<",
    ">=": "<=",
    "\\ge": "<=",
    "\\geq": "<=",
    "\\geqslant": "<=",
}
_LESS = ("<", "\\lt", "<=", "\\le", "\\leq", "\\leqslant")


def _scalar(text: str) -> Form:
    numeral = _NUMERAL.fullmatch(text)
    if numeral is not None:
        digits, base = numeral[1].strip("()"), int(numeral[2][:3])
        if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits.lstrip("-")):
            raise Unreadable
        return Numeral(int(digits, base), base)
    number, factor, unit = split_unit(text)
    value = read_expression(number)
    return Scalar(multiply(value, constant(factor)), unit)
