"""Extraction of final answers and comparison of numbers: hand-written cases."""

import time

import pytest

from speed_async.environments.final_answer import final_answer, last_boxed, last_tagged
from speed_async.environments.numeric_answer import last_number, same_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("  42 \n", "42"),
        (r"so \boxed{3} and then \boxed{ 4 }.", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{3} but then \boxed{4", "3"),
        (r"\boxed{3", r"\boxed{3"),
        ("steps: 2 + 2\n#### 4 ", "4"),
        ("#### 3\n#### 5", "5"),
        (r"\boxed{6} #### 7", "6"),
        (r"\boxed{\{1, 2\}} }", r"\{1, 2\}"),
        (r"{ \boxed{a} and { \boxed{b", "a"),
    ],
)
def test_final_answer_is_last_box_then_mark_then_whole_text(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_last_tag_is_used_and_missing_tag_is_none() -> None:
    assert last_tagged("<answer>1</answer> no <answer>\n2\n</answer>") == "2"
    assert last_tagged("<answer>1") is None
    assert last_boxed("nothing") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 12.", 12),
        ("first 3, then 4", 4),
        ("1,234,567", 1234567),
        ("1,2", 2),
        (r"1{,}234", 1234),
        ("-3.5", -3.5),
        ("it is -3", -3),
        ("x=-3", -3),
        ("\u22127", -7),
        ("5 - 3 = 2", 2),
        ("+8", 8),
        ("1.5e-3", 0.0015),
        ("2E3", 2000.0),
        (".5", 0.5),
        ("3/4", 0.75),
        ("-3 / 4", -0.75),
        (r"\frac{3}{4}", 0.75),
        (r"-\dfrac{1}{4}", -0.25),
        ("$5", 5),
        (r"\$1,000 in all", 1000),
        ("-$5", -5),
        ("5cm", 5),
        ("20%", 20),
        ("is **17**", 17),
        ("**17.**", 17),
        ("(42)", 42),
        (r"\boxed{-\$18}", -18),
        (r"x \approx 3.14", 3.14),
        (r"\boxed{9} after 3 tries", 9),
        ("work 1 2 3\n#### 72", 72),
    ],
)
def test_last_number_is_parsed(text: str, number: float) -> None:
    assert last_number(text) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no digits",
        "2^99",
        "1/2^99",
        "2^{99}",
        r"\sqrt{16}",
        r"3\sqrt{2}",
        r"2 \times 5",
        "2*5",
        "2**5",
        "5 - 3",
        "5-3",
        "x - 3",
        "3 + 4",
        "10-20",
        "COVID-19",
        "a_3",
        "x2",
        "5!",
        r"2\pi",
        "1 1/2",
        "3/0",
        "3/4/2020",
        "1e999",
        "9" * 2000,
    ],
)
def test_number_within_an_expression_is_not_an_answer(text: str) -> None:
    assert last_number(text) is None


def test_integers_compare_exactly_and_floats_with_relative_tolerance() -> None:
    assert same_number(1234567890, 1234567890)
    assert not same_number(1234567891, 1234567890)
    assert same_number(2.0, 2)
    assert same_number(1.0000009, 1)
    assert not same_number(1.0000011, 1)
    assert same_number(0.3333334, 1 / 3)
    assert not same_number(1e-9, 0)
    assert not same_number(-2, 2)


def test_long_completions_are_parsed_in_linear_time() -> None:
    adversarial = "1,111" * 20_000 + "-" * 20_000 + "(" * 20_000
    began_s = time.thread_time()
    for text in (adversarial, "\\boxed{" * 20_000, "111," * 20_000, "* " * 20_000 + "5"):
        last_number(text)
    assert time.thread_time() - began_s < 5.0  # 0.1 s; minutes if it were quadratic
