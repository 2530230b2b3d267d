"""The exact path: equal and different answers, bounds, and what it leaves to math-verify."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speed_async.environments.mathematics.comparison import MAX_CHARS, same_math

EQUAL = [
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}"),
    (r"\frac{1}{1+\sqrt{2}}", r"\sqrt{2} - 1"),
    (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"),
    (r"\sqrt{-4}", "2i"),
    ("i^{-1}", "-i"),
    (r"2^{100} - 2", "1267650600228229401496703205374"),
    (r"0.1\overline{6}", r"\frac16"),
    (r"-15\frac{3}{5}", r"-\frac{78}{5}"),
    (r"\binom{5}{2}", "10"),
    ("(x-1)(x+1)", "x^2-1"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    ("x_1 + x_{2}", "x_2 + x_1"),
    ("y - 2x = 3", "y = 2x + 3"),
    (r"\$1.50", "150 cents"),
    ("2 hours", r"120 \text{ minutes}"),
    (r"3 \text{ or } -3", r"\pm 3"),
    (r"\{(1,2),(3,4)\}", "(3,4), (1,2)"),
    (r"x \neq 3", r"x \neq 3"),
]
DIFFERENT = [
    ("1/2^{99}", "1/2^{98}"),
    ("50", r"50\%"),
    ("(1,2)", r"\{1,2\}"),
    ("1,2", "(1,2)"),
    ("2x = 1", "3x = 1"),
    ("58, 500", "58,500"),
    (r"\text{seat}", r"\text{east}"),
    ("3.14", r"\pi"),
    ("0.333", r"\frac13"),
    ("5 kg", "5 m"),
    ("9^{9^{9^9}}", "9"),
    ("(x+1)^{5000}", "1"),
    ("1000000!", "1"),
]
UNDECIDED = [
    (r"\frac{1}{\tan x}", r"\cot x"),
    (r"\sqrt{x^2}", "x"),
    ("1/2x", "x/2"),
    ("x2", "2x"),
    (r"2^2\frac{1}{2}", "2^{5/2}"),
    (r"2\frac{5}{3}", "11/3"),
    ("5 million", "5000000"),
    ("40_0", "40_9"),
    ("1/0", "0"),
]


@pytest.mark.parametrize(("candidate", "answer"), EQUAL)
def test_equal_values_in_other_notations_are_equal(candidate: str, answer: str) -> None:
    assert same_math(candidate, answer) is True
    assert same_math(answer, candidate) is True


@pytest.mark.parametrize(("candidate", "answer"), DIFFERENT)
def test_other_values_and_other_kinds_differ(candidate: str, answer: str) -> None:
    assert same_math(candidate, answer) is False
    assert same_math(answer, candidate) is False


@pytest.mark.parametrize(("candidate", "answer"), UNDECIDED)
def test_what_is_ambiguous_or_outside_the_grammar_is_undecided(candidate: str, answer: str) -> None:
    assert same_math(candidate, answer) is None


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_fractions_are_equal_when_their_values_are(left: Fraction, right: Fraction) -> None:
    texts = [rf"\frac{{{3 * each.numerator}}}{{{3 * each.denominator}}}" for each in (left, right)]
    assert same_math(texts[0], str(left)) is True
    assert same_math(texts[0], texts[1]) is (left == right)


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=6), st.randoms())
def test_order_matters_in_a_tuple_and_not_in_a_set(numbers: list[int], random) -> None:
    shuffled = list(numbers)
    random.shuffle(shuffled)
    texts = [", ".join(map(str, each)) for each in (numbers, shuffled)]
    assert same_math(rf"\{{{texts[0]}\}}", texts[1]) is True
    assert same_math(f"({texts[0]})", f"({texts[1]})") is (numbers == shuffled)


def test_an_answer_beyond_the_bounds_equals_only_its_own_text() -> None:
    digits = "7" * (MAX_CHARS + 1)
    assert same_math(digits, digits) is True
    assert same_math(digits, "7") is False
    assert same_math("{" * 400 + "5" + "}" * 400, "5") is False
    assert same_math("2^{99999999}", "2^{99999999}") is True


def test_an_empty_answer_equals_nothing() -> None:
    assert same_math("", "") is False


def test_hostile_answers_of_the_longest_length_are_decided_in_a_second() -> None:
    hostile = [
        "1+" * 499 + "1",
        "(x+1)" * 199,
        "1," * 499 + "1",
        "-" * 999 + "1",
        r"\frac{1}{" * 110 + "1",
        "a^9b^9c^9+" * 99 + "1",
        "(a+b+c+d+e+f)^{40}",
        r"\sqrt{" + "123456789" * 100 + "}",
        "9" * 499 + "^" + "9" * 499,
        " " * 999 + "5",
        r"\text{" * 160,
        r"1 \pm 2," * 120,
    ]
    for text in hostile:
        start_s = time.thread_time()
        same_math(text, "5")
        assert time.thread_time() - start_s < 1, text[:20]
