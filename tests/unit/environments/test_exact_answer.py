"""Answers that match under `task.match = "exact"`: hand-written cases."""

import pytest

from speed_async.environments.exact_answer import exact_answer, same_answer


def match(candidate: str, answer: str) -> bool:
    return same_answer(exact_answer(candidate), exact_answer(answer))


@pytest.mark.parametrize(
    ("candidate", "answer"),
    [
        ("27", "27.0"),
        (r"\boxed{27}", "27.0"),
        ("+27.00", "27"),
        ("1,000", "1000"),
        ("25", "025"),
        (r"10,\!080", "10080"),
        (r"\dfrac{14}{3}", r"\frac{14}{3}"),
        (r"\tfrac43", r"\frac{4}{3}"),
        (r"\frac 43", r"\frac{4}{3}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"$x = 5$", "x=5"),
        (r"\$18.90", "$18.90"),
        (r"3 \sqrt{13}", r"3\sqrt{13}"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"x^{2}+1", "x^2+1"),
        (r"90^{\circ}", r"90^\circ"),
        ("  blue \n sky ", "blue sky"),
        ("blue sky.", "blue sky"),
        (r"so \boxed{\text{blue  sky}}", "because\n#### blue sky"),
    ],
)
def test_equivalent_notations_match(candidate: str, answer: str) -> None:
    assert match(candidate, answer) and match(answer, candidate)


@pytest.mark.parametrize(
    ("candidate", "answer"),
    [
        ("27.1", "27"),
        ("-27", "27"),
        ("0.5", r"\frac{1}{2}"),
        ("1/2", "0.5"),
        ("2 3", "23"),
        ("bluesky", "blue sky"),
        ("Blue", "blue"),
        ("5 cm", "5"),
        ("5 cm", "5 km"),
        ("1,2", "12"),
        ("(3, 4)", "(4, 3)"),
        ("20%", "20"),
        ("x^{12}", "x^1 2"),
        (r"\frac{1}{23}", r"\frac{12}{3}"),
        ("answer: 27", "27"),
    ],
)
def test_different_answers_do_not_match(candidate: str, answer: str) -> None:
    assert not match(candidate, answer)


@pytest.mark.parametrize("text", ["", "  ", "####", "#### ", r"\boxed{}", r"\boxed{ }"])
def test_empty_answers_never_match(text: str) -> None:
    assert not match(text, "####")
    assert not match(text, "")
    assert not match(text, text)
