r"""The forms that the exact path reads and compares.

| form | examples |
| --- | --- |
| `Scalar` | `58,500`, `\frac{3}{4}`, `2\sqrt{5}`, `x^2 - 1`, `50\%`, `5.4\text{ cents}` |
| `Numeral` | `52_8` |
| `Words` | `\text{Evelyn}`, `ellipse` |
| `Ordered` | `(3, \frac{\pi}{2})`, `(-\infty, 2]`, `3:5` |
| `Unordered` | `1, -2`, `\{1, 2\}`, `1 \pm \sqrt{19}`, `(0,9) \cup (9,36)` |
| `Matrix` | `\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}` |
| `Named` | `x = 5`, `y = 2x + 3`, `x \in [-2,7]`, `-2 \le x \le 7`, `5x - 7y + 4 = 0` |

An open interval and a pair are the same text, and so the same form. A comma separates thousands
only outside brackets and where it is followed by exactly three digits and no space.
"""

from dataclasses import dataclass

from speed_async.environments.mathematics.expression import Expression
from speed_async.environments.mathematics.units import Unit


@dataclass(frozen=True, slots=True)
class Scalar:
    value: Expression
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class Numeral:
    value: int
    base: int


@dataclass(frozen=True, slots=True)
class Words:
    text: str


@dataclass(frozen=True, slots=True)
class Ordered:
    opening: str
    closing: str
    items: "tuple[Form, ...]"


@dataclass(frozen=True, slots=True)
class Unordered:
    items: "tuple[Form, ...]"
    kind: str
    """`list` (also a set) or `union`."""


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: "tuple[tuple[Form, ...], ...]"


@dataclass(frozen=True, slots=True)
class Named:
    """A value with a name, an equation (`equation` = 0), or both."""

    name: str | None
    value: "Form | None"
    equation: Expression | None


Form = Scalar | Numeral | Words | Ordered | Unordered | Matrix | Named
