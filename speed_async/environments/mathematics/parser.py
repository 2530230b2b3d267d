r"""Reads one expression in LaTeX or plain notation: numbers, variables, arithmetic and roots.

Read: `+ - * / ^`, `\cdot`, `\times`, `\div`, implicit products, brackets, `\frac`, `\sqrt[n]`,
`\binom`, factorials of integers, `\pi`, `e`, `i`, `\exp`, mixed numbers (`1\frac{4}{5}`, `1 4/5`),
repeating decimals (`0.\overline{3}`), scientific notation, variables with a subscript.

Unreadable: other functions, exponents with variables, and what is ambiguous: an implicit product
after a division (`1/2x`), a number after a variable (`x2`), `2\frac{5}{3}`.
"""

import re
from fractions import Fraction
from math import comb, factorial

from speed_async.environments.mathematics.expression import (
    Expression,
    TooLarge,
    Unreadable,
    add,
    constant,
    divide,
    multiply,
    negate,
    power,
    rational,
    symbol,
)

MAX_DEPTH = 50
"""Nested brackets, braces and signs."""
MAX_FACTORIAL = 200
MAX_DIGITS = 1000
"""Of one literal."""

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:\\overline\{(?P<period>\d+)\}"
    r"|[eE](?P<exponent>[-+]?\d{1,3})(?![\d.]))?)"
    r"|(?P<name>\\[A-Za-z]+|sqrt|exp|pi|[A-Za-z])|(?P<sign>[-+*/^_!(){}\[\]]))\s*"
)
_GREEK = re.compile(
    r"\\(?:alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|kappa|lambda|mu|nu|xi|rho"
    r"|sigma|tau|(?:var)?phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|ell"
    r"|infty)"
)
_TIMES = ("*", "\\cdot", "\\times")
_OVER = ("/", "\\div")
_CLOSING = {"(": ")", "[": "]", "{": "}"}

Token = Expression | str
"""A number, or the text of any other token."""


def read_expression(text: str) -> Expression:
    """Raises Unreadable or TooLarge."""
    parser = _Parser(_tokens(text))
    expression = parser.sum(0)
    parser.end()
    return expression


def _tokens(text: str) -> list[Token]:
    tokens: list[Token] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise Unreadable
        position = match.end()
        number = match["number"]
        tokens.append(_literal(match) if number else match["name"] or match["sign"])
    return tokens


def _literal(match: re.Match[str]) -> Expression:
    text, period, exponent = match["number"], match["period"], match["exponent"]
    if len(text) > MAX_DIGITS:
        raise TooLarge
    digits = re.split(r"\\|[eE]", text, maxsplit=1)[0]
    value = Fraction(digits)
    if period:
        num_decimals = len(digits.partition(".")[2])
        value += Fraction(int(period), (10 ** len(period) - 1) * 10**num_decimals)
    if exponent:
        value *= Fraction(10) ** int(exponent)
    return constant(value)


class _Parser:
    """A recursive-descent parser over the tokens of one expression."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._position = 0

    def end(self) -> None:
        if self._position < len(self._tokens):
            raise Unreadable

    def sum(self, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise TooLarge
        total = self._signed_term(depth)
        while self._peek() in ("+", "-"):
            total = add(total, self._signed_term(depth))
        return total

    def _signed_term(self, depth: int) -> Expression:
        is_negative = False
        while (sign := self._peek()) in ("+", "-"):
            self._position += 1
            is_negative ^= sign == "-"
        term = self._term(depth)
        return negate(term) if is_negative else term

    def _term(self, depth: int) -> Expression:
        product = self._power(depth)
        is_divided = False
        while (token := self._peek()) is not None:
            if token in _TIMES:
                self._position += 1
                product = multiply(product, self._signed_power(depth))
            elif token in _OVER:
                self._position += 1
                product = divide(product, self._signed_power(depth))
                is_divided = True
            elif self._starts_factor(token):
                if is_divided:
                    raise Unreadable  # 1/2x
                if self._is_fraction_of_integers():
                    raise Unreadable  # 2\frac{5}{3}; mixed numbers are read in _atom
                product = multiply(product, self._power(depth))
            else:
                break
        return product

    def _starts_factor(self, token: Token) -> bool:
        previous = self._tokens[self._position - 1]
        if isinstance(token, Expression):
            if previous not in (")", "}", "]"):
                raise Unreadable  # `2 3` or `x2`
            return True
        return token in ("(", "{") or token[0] == "\\" or token.isalpha()

    def _signed_power(self, depth: int) -> Expression:
        if self._peek() in ("+", "-"):
            is_negative = self._next() == "-"
            value = self._power(depth)
            return negate(value) if is_negative else value
        return self._power(depth)

    def _power(self, depth: int) -> Expression:
        base = self._atom(depth)
        while self._peek() == "!":
            self._position += 1
            base = constant(factorial(_natural(base, MAX_FACTORIAL)))
        if self._peek() != "^":
            return base
        self._position += 1
        exponent = rational(self._argument(depth))
        if exponent is None or self._peek() in ("^", "!"):
            raise Unreadable
        return power(base, exponent)

    def _argument(self, depth: int) -> Expression:
        """What follows `^`, `\\frac` or `\\sqrt`: a group, or one signed atom."""
        if self._peek() in ("+", "-"):
            is_negative = self._next() == "-"
            value = self._argument(depth + 1)
            return negate(value) if is_negative else value
        token = self._peek()
        if isinstance(token, Expression):
            self._position += 1
            return token  # `x^2\frac{1}{2}` has no mixed number
        return self._atom(depth + 1)

    def _atom(self, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise TooLarge
        token = self._next()
        if isinstance(token, Expression):
            return self._mixed(token)
        if token in _CLOSING:
            value = self.sum(depth + 1)
            if self._next() != _CLOSING[token]:
                raise Unreadable
            return value
        if token in ("\\frac", "\\binom"):
            top, bottom = self._argument(depth), self._argument(depth)
            return divide(top, bottom) if token == "\\frac" else _binomial(top, bottom)
        if token in ("\\sqrt", "sqrt"):
            return self._root(depth)
        if token in ("\\exp", "exp"):
            exponent = rational(self._argument(depth))
            if exponent is None:
                raise Unreadable
            return power(symbol("e"), exponent)
        if token in ("\\pi", "pi"):
            return symbol("\\pi")
        if token.isalpha() or _GREEK.fullmatch(token) is not None:
            return symbol(token + self._subscript())
        raise Unreadable

    def _root(self, depth: int) -> Expression:
        degree = Fraction(2)
        if self._peek() == "[":
            self._position += 1
            degree = Fraction(_natural(self.sum(depth + 1), MAX_DEPTH))
            if self._next() != "]" or degree < 2:
                raise Unreadable
        radicand = self._argument(depth)
        value = rational(radicand)
        if value is not None and value < 0 and degree % 2:
            return negate(power(negate(radicand), 1 / degree))
        return power(radicand, 1 / degree)

    def _mixed(self, whole: Expression) -> Expression:
        """`whole`, plus a proper fraction of integers that follows it."""
        if self._position > 1 and self._tokens[self._position - 2] in _OVER:
            return whole
        fraction, length = self._plain_fraction()
        if fraction is None:
            fraction, length = self._latex_fraction()
        value = rational(whole)
        if fraction is None or value is None or value.denominator != 1:
            return whole
        if not 0 < fraction < 1:
            raise Unreadable
        self._position += length
        return add(whole, constant(fraction))

    def _latex_fraction(self) -> tuple[Fraction | None, int]:
        r"""The value and length of `\frac{4}{5}`, if that is next."""
        tokens = self._tokens[self._position : self._position + 7]
        if len(tokens) < 7 or tokens[::3] != ["\\frac", "}", "}"] or tokens[1::3] != ["{", "{"]:
            return None, 0
        return _fraction(tokens[2], tokens[5]), 7

    def _plain_fraction(self) -> tuple[Fraction | None, int]:
        """The value and length of `4/5`, if that is next."""
        tokens = self._tokens[self._position : self._position + 3]
        if len(tokens) < 3 or tokens[1] != "/":
            return None, 0
        return _fraction(tokens[0], tokens[2]), 3

    def _is_fraction_of_integers(self) -> bool:
        previous = self._tokens[self._position - 1]
        return isinstance(previous, Expression) and self._latex_fraction()[0] is not None

    def _subscript(self) -> str:
        if self._peek() != "_":
            return ""
        self._position += 1
        token = self._next()
        if token == "{":
            token = self._next()
            if self._next() != "}":
                raise Unreadable
        if isinstance(token, Expression):
            return f"_{rational(token)}"
        if not token.isalpha():
            raise Unreadable
        return "_" + token

    def _peek(self) -> Token | None:
        return self._tokens[self._position] if self._position < len(self._tokens) else None

    def _next(self) -> Token:
        token = self._peek()
        if token is None:
            raise Unreadable
        self._position += 1
        return token


def _fraction(top: Token, bottom: Token) -> Fraction | None:
    if not isinstance(top, Expression) or not isinstance(bottom, Expression):
        return None
    numerator, denominator = rational(top), rational(bottom)
    if not numerator or not denominator or numerator.denominator * denominator.denominator != 1:
        return None
    return numerator / denominator


def _binomial(top: Expression, bottom: Expression) -> Expression:
    return constant(comb(_natural(top, MAX_FACTORIAL), _natural(bottom, MAX_FACTORIAL)))


def _natural(expression: Expression, most: int) -> int:
    value = rational(expression)
    if value is None or value.denominator != 1 or value < 0:
        raise Unreadable
    if value > most:
        raise TooLarge
    return int(value)
