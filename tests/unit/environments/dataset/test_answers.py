import math

import pytest

from speed_async.environments.dataset.answers import (
    AnswerError,
    answer_text,
    is_integer,
    solution_answer,
)


@pytest.mark.parametrize(
    ("published", "normalised"),
    [
        (27.0, "27"),
        (-0.0, "0"),
        (2.5, "2.5"),
        (18, "18"),
        (10**400, "1" + "0" * 400),
        ("27.0", "27"),
        ("033", "33"),
        ("+5", "5"),
        ("-0", "0"),
        ("70000.", "70000"),
        ("1,234", "1234"),
        ("1{,}234{,}567", "1234567"),
        ("12,34", "12,34"),
        ("(1,234)", "(1,234)"),
        ("$-7$", "-7"),
        ("$\\frac{1}{2}$", "\\frac{1}{2}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("She has 48/2 = 24.\n#### 2,125", "2125"),
        ("so \\boxed{3}, no, \\boxed{4}", "4"),
        (["5"], "5"),
    ],
)
def test_an_answer_is_normalised(published: object, normalised: str) -> None:
    assert answer_text(published) == normalised


@pytest.mark.parametrize(
    ("published", "reason"),
    [
        (None, "missing"),
        ("  ", "empty"),
        ("#### ", "empty"),
        (math.nan, "finite"),
        (True, "bool"),
        (["1", "2"], "list"),
        ("\ud800", "surrogate"),
    ],
)
def test_a_value_that_is_no_answer_is_refused_with_its_reason(
    published: object, reason: str
) -> None:
    with pytest.raises(AnswerError, match=reason):
        answer_text(published)


def test_a_solution_states_its_answer_in_its_last_box() -> None:
    assert (
        solution_answer("First $\\boxed{1}$, then $x = \\boxed{\\frac{3}{4}}$.") == "\\frac{3}{4}"
    )


def test_a_solution_without_a_box_states_no_answer() -> None:
    with pytest.raises(AnswerError, match="boxed"):
        solution_answer("The answer is 5.")


def test_only_integers_count_as_integers() -> None:
    assert is_integer("-12")
    assert not any(map(is_integer, ("2.5", "1/2", "x", "12 cm", "3,4")))
