r"""Whether two answers have the same value: exact, linear in the text, and undecided when unsure.

No tolerance: a decimal is the rational number that it writes, so `0.333` is not `\frac{1}{3}` and
`3.14` is not `\pi`. An equation equals its multiples by a constant. `x = 5` equals `5`; `x = 5`
and `y = 5` differ. A set or a list has no order but counts repetitions; a pair or an interval
equals only the same brackets.
"""

from fractions import Fraction
from functools import lru_cache

from speed_async.environments.mathematics.expression import (
    TooLarge,
    Unreadable,
    are_proportional,
    constant,
    multiply,
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
from speed_async.environments.mathematics.reader import read_form
from speed_async.environments.mathematics.text import clean, is_words, words_in

MAX_CHARS = 1000
"""A longer answer is wrong, unless its text is that of the ground truth."""


def same_math(candidate: str, answer: str) -> bool | None:
    """Whether a candidate equals the ground truth; None when exact rules do not decide it.

    An answer beyond the bounds (MAX_CHARS, expression.py, parser.py, forms.py) is not evaluated.
    It equals only the same text.
    """
    if not candidate or not answer:
        return False
    if candidate == answer:
        return True
    if max(len(candidate), len(answer)) > MAX_CHARS:
        return False
    left, right = clean(candidate), clean(answer)
    if left == right:
        return True
    if is_words(left) or is_words(right):
        words = words_in(left)
        if words is not None and words == words_in(right):
            return True
    try:
        forms = _form(left), _form(right)
        if forms[0] is None or forms[1] is None:
            return None
        return same_form(forms[0], forms[1])
    except TooLarge:
        return False


@lru_cache(maxsize=2048)
def _form(text: str) -> Form | None:
    """Cached, because the completions of one prompt share the ground truth and often answers."""
    try:
        return read_form(text)
    except Unreadable:
        return None


def same_form(left: Form, right: Form) -> bool | None:
    """A name is ignored when only one side has it."""
    if isinstance(left, Named) and isinstance(right, Named):
        if left.name == right.name and left.value is not None and right.value is not None:
            return _same(left.value, right.value)
        if left.equation is None or right.equation is None:
            return False
        return are_proportional(left.equation, right.equation)
    if isinstance(left, Named):
        return left.value is not None and _same(left.value, right)
    if isinstance(right, Named):
        return right.value is not None and _same(left, right.value)
    return _same(left, right)


def _same(left: Form, right: Form) -> bool | None:
    if isinstance(left, Scalar) and isinstance(right, Scalar):
        return _same_scalar(left, right)
    if isinstance(left, Ordered) and isinstance(right, Ordered):
        same_brackets = (left.opening, left.closing) == (right.opening, right.closing)
        return same_brackets and _same_items(left.items, right.items)
    if isinstance(left, Unordered) and isinstance(right, Unordered):
        return left.kind == right.kind and _same_sets(left, right)
    if isinstance(left, Matrix) and isinstance(right, Matrix):
        shapes = [(len(each.rows), len(each.rows[0])) for each in (left, right)]
        entries = [tuple(entry for row in each.rows for entry in row) for each in (left, right)]
        return shapes[0] == shapes[1] and _same_items(*entries)
    if isinstance(left, Named) and isinstance(right, Named):
        return same_form(left, right)
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Unordered) and len(one.items) == 1 and isinstance(other, Scalar):
            return _same(one.items[0], other)  # {5} and 5
    if isinstance(left, Numeral | Words):
        return left == right
    return False


def _same_items(left: tuple[Form, ...], right: tuple[Form, ...]) -> bool | None:
    if len(left) != len(right):
        return False
    results = [_same(one, other) for one, other in zip(left, right, strict=True)]
    if False in results:
        return False
    return None if None in results else True


def _same_sets(left: Unordered, right: Unordered) -> bool | None:
    if len(left.items) != len(right.items):
        return None if left.kind == "union" else False  # overlapping intervals may be merged
    rest = list(right.items)
    for item in left.items:
        index = next((i for i, other in enumerate(rest) if _same(item, other)), None)
        if index is None:
            return None if left.kind == "union" else False
        del rest[index]
    return True


def _same_scalar(left: Scalar, right: Scalar) -> bool:
    if left.unit is not None and right.unit is not None:
        factors = constant(left.unit.factor), constant(right.unit.factor)
        return left.unit.dimension == right.unit.dimension and same_value(
            multiply(left.value, factors[0]), multiply(right.value, factors[1])
        )
    return (
        same_value(left.value, right.value) or _same_angle(left, right) or _same_angle(right, left)
    )


def _same_angle(degrees: Scalar, radians: Scalar) -> bool:
    r"""90^\circ = \frac{\pi}{2}"""
    is_angle = degrees.unit is not None and degrees.unit.dimension == "angle^1"
    if not is_angle or "\\pi" not in symbols(radians.value):
        return False
    radian = multiply(symbol("\\pi"), constant(Fraction(1, 180)))
    return same_value(multiply(degrees.value, radian), radians.value)
