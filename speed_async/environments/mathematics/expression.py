r"""Exact algebra of expressions: quotients of polynomials, compared without floating point.

A polynomial is over the rational numbers, in symbols (variables, `pi`, `e`), the imaginary unit
`i`, and roots of primes. Roots are powers of primes with an exponent in (0, 1). Different products
of such powers are linearly independent over the rational numbers (A. Besicovitch, "On the linear
independence of fractional powers of integers", 1940), so equal values have equal polynomials:
`\sqrt{12}` = `2\sqrt{3}`, `\frac{1}{\sqrt{2}}` = `\frac{\sqrt{2}}{2}`. Quotients are compared by
cross-multiplication.

Every result is bounded by MAX_TERMS and MAX_BITS; a larger one raises TooLarge.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import floor

MAX_TERMS = 256
MAX_BITS = 16384
"""Bits of a coefficient: 4,932 decimal digits."""
MAX_EXPONENT = 10_000
MAX_EXPANDED_EXPONENT = 40
"""Of a sum, which is multiplied out."""
MAX_TRIAL_DIVISOR = 2000

IMAGINARY_UNIT = "i"
_POSITIVE_SYMBOLS = ("\\pi", "e")
"""Symbols whose fractional powers are well defined."""

Monomial = tuple[tuple[str, Fraction | int], ...]
"""Pairs of a symbol and its exponent, in the order of the symbols. A prime is its digits."""
Polynomial = dict[Monomial, Fraction]
"""Coefficients, none of which is zero."""


class Unreadable(Exception):
    """The text is outside the grammar of the exact path, or ambiguous."""


class TooLarge(Exception):
    """A value exceeds a bound of this module."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A quotient; a denominator of one term is always divided out."""

    numerator: Polynomial
    denominator: Polynomial


_ONE: Polynomial = {(): Fraction(1)}


def constant(value: Fraction | int) -> Expression:
    return Expression({(): Fraction(value)} if value else {}, _ONE)


def symbol(name: str) -> Expression:
    return Expression({((name, 1),): Fraction(1)}, _ONE)


def rational(expression: Expression) -> Fraction | None:
    """The value of a rational number; None for any other expression."""
    if not expression.numerator:
        return Fraction(0)
    if expression.denominator == _ONE and list(expression.numerator) == [()]:
        return expression.numerator[()]
    return None


def is_polynomial(expression: Expression) -> bool:
    return expression.denominator == _ONE


def symbols(expression: Expression) -> set[str]:
    polynomials = (expression.numerator, expression.denominator)
    return {name for each in polynomials for monomial in each for name, _ in monomial}


def add(left: Expression, right: Expression) -> Expression:
    if left.denominator == right.denominator:
        return Expression(_sum(left.numerator, right.numerator), left.denominator)
    return _quotient(
        _sum(
            _product(left.numerator, right.denominator),
            _product(right.numerator, left.denominator),
        ),
        _product(left.denominator, right.denominator),
    )


def negate(expression: Expression) -> Expression:
    return Expression(_scaled(expression.numerator, Fraction(-1)), expression.denominator)


def multiply(left: Expression, right: Expression) -> Expression:
    return _quotient(
        _product(left.numerator, right.numerator), _product(left.denominator, right.denominator)
    )


def divide(left: Expression, right: Expression) -> Expression:
    """Raises Unreadable when `right` is zero."""
    return multiply(left, _quotient(right.denominator, right.numerator))


def power(base: Expression, exponent: Fraction) -> Expression:
    if exponent < 0:
        return power(divide(constant(1), base), -exponent)
    if not base.numerator:
        if not exponent:
            raise Unreadable
        return base
    if base.denominator == _ONE and len(base.numerator) == 1:
        ((monomial, coefficient),) = base.numerator.items()
        return _power_of_term(monomial, coefficient, exponent)
    if exponent.denominator != 1:
        raise Unreadable
    if exponent > MAX_EXPANDED_EXPONENT:
        raise TooLarge
    result = constant(1)
    for _ in range(int(exponent)):
        result = multiply(result, base)
    return result


def same_value(left: Expression, right: Expression) -> bool:
    return _product(left.numerator, right.denominator) == _product(
        right.numerator, left.denominator
    )


def are_proportional(left: Expression, right: Expression) -> bool:
    """Whether `left = 0` and `right = 0` are the same equation up to a constant factor."""
    if not left.numerator or not right.numerator:
        return not left.numerator and not right.numerator
    first = min(left.numerator)
    if first not in right.numerator:
        return False
    factor = left.numerator[first] / right.numerator[first]
    return left.numerator == _scaled(right.numerator, factor)


def _sum(left: Polynomial, right: Polynomial) -> Polynomial:
    result = dict(left)
    for monomial, coefficient in right.items():
        total = result.get(monomial, Fraction(0)) + coefficient
        if total:
            result[monomial] = total
        else:
            result.pop(monomial, None)
    return _bounded(result)


def _scaled(polynomial: Polynomial, factor: Fraction) -> Polynomial:
    if factor == 1:
        return polynomial
    return {monomial: factor * coefficient for monomial, coefficient in polynomial.items()}


def _product(left: Polynomial, right: Polynomial) -> Polynomial:
    for constant_part, other in ((left, right), (right, left)):
        if len(constant_part) == 1 and () in constant_part:
            return _bounded(_scaled(other, constant_part[()]))
    if len(left) * len(right) > MAX_TERMS**2 // 4:
        raise TooLarge
    result: Polynomial = {}
    for left_monomial, left_coefficient in left.items():
        for right_monomial, right_coefficient in right.items():
            exponents = dict(left_monomial)
            for name, exponent in right_monomial:
                exponents[name] = exponents.get(name, 0) + exponent
            factor, monomial = _reduced(exponents)
            coefficient = left_coefficient * right_coefficient * factor
            result[monomial] = result.get(monomial, Fraction(0)) + coefficient
    return _bounded({monomial: value for monomial, value in result.items() if value})


def _quotient(numerator: Polynomial, denominator: Polynomial) -> Expression:
    if not denominator:
        raise Unreadable
    if len(denominator) > 1:
        return Expression(numerator, denominator)
    ((monomial, coefficient),) = denominator.items()
    if not monomial:
        return Expression(_bounded(_scaled(numerator, 1 / coefficient)), _ONE)
    factor, inverse = _reduced({name: -exponent for name, exponent in monomial})
    return Expression(_product(numerator, {inverse: factor / coefficient}), _ONE)


def _reduced(exponents: dict[str, Fraction | int]) -> tuple[Fraction, Monomial]:
    """The rational factor of a product of powers, and the rest: i^3 is -1 and i."""
    factor = Fraction(1)
    rest: list[tuple[str, Fraction | int]] = []
    for name, exponent in exponents.items():
        if name == IMAGINARY_UNIT:
            if exponent % 4 >= 2:
                factor = -factor
            exponent = exponent % 2
        elif name.isdigit():
            whole = floor(exponent)
            factor *= Fraction(int(name)) ** whole
            exponent -= whole
        if exponent:
            rest.append((name, exponent))
    return factor, tuple(sorted(rest))


def _power_of_term(monomial: Monomial, coefficient: Fraction, exponent: Fraction) -> Expression:
    if exponent.denominator == 1:
        if max(_num_bits(coefficient), len(monomial)) * exponent > MAX_BITS:
            raise TooLarge
        result = Expression({(): coefficient ** int(exponent)}, _ONE)
    else:
        result = _root(coefficient, exponent)
    exponents: dict[str, Fraction | int] = {}
    for name, old in monomial:
        if exponent.denominator != 1 and not (name.isdigit() or name in _POSITIVE_SYMBOLS):
            raise Unreadable  # the root of a variable depends on its sign
        new = old * exponent
        if new > MAX_EXPONENT:
            raise TooLarge
        exponents[name] = int(new) if new.denominator == 1 else new
    factor, rest = _reduced(exponents)
    return multiply(result, Expression({rest: factor}, _ONE))


def _root(value: Fraction, exponent: Fraction) -> Expression:
    if abs(exponent.numerator) * _num_bits(value) > MAX_BITS:
        raise TooLarge
    exponents: dict[str, Fraction | int] = {}
    if value < 0 and exponent == Fraction(1, 2):
        exponents[IMAGINARY_UNIT] = 1
    elif value < 0:
        raise Unreadable
    for part, sign in ((abs(value.numerator), 1), (value.denominator, -1)):
        for prime, multiplicity in _factors(part).items():
            exponents[str(prime)] = exponents.get(str(prime), 0) + sign * multiplicity * exponent
    factor, rest = _reduced(exponents)
    return Expression({rest: factor}, _ONE)


def _factors(number: int) -> dict[int, int]:
    """Prime factors by trial division; Unreadable when it does not suffice."""
    factors: dict[int, int] = {}
    divisor = 2
    while divisor * divisor <= number and divisor < MAX_TRIAL_DIVISOR:
        while number % divisor == 0:
            number //= divisor
            factors[divisor] = factors.get(divisor, 0) + 1
        divisor += 1
    if number >= MAX_TRIAL_DIVISOR**2:
        raise Unreadable
    if number > 1:
        factors[number] = factors.get(number, 0) + 1
    return factors


def _num_bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bounded(polynomial: Polynomial) -> Polynomial:
    if len(polynomial) > MAX_TERMS or any(
        _num_bits(coefficient) > MAX_BITS for coefficient in polynomial.values()
    ):
        raise TooLarge
    return polynomial
