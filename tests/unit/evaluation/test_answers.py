"""Equality of extracted answers in a vote."""

from speed_async.evaluation.answers import answer_classes


def test_mathematical_answers_of_equal_value_vote_together() -> None:
    answers = ["\\frac{1}{2}", "0.5", " \\dfrac12 ", "2", None, "1/2", "", "x=2"]
    assert answer_classes(answers, "math") == [0, 0, 0, 1, None, 0, None, 1]


def test_exact_answers_vote_together_by_text_or_decimal_value() -> None:
    answers = ["1,000", "1000.0", "1/2", "0.5", "$1000$"]
    assert answer_classes(answers, "exact") == [0, 0, 1, 2, 0]


def test_numeric_answers_vote_together_by_value() -> None:
    assert answer_classes(["1/2", "0.5", "5 cm", "5"], "numeric") == [0, 0, 1, 1]


def test_unreadable_answers_are_equal_only_to_themselves() -> None:
    assert answer_classes(["\\foo{", "\\foo{", "bar baz"], "math") == [0, 0, 1]
