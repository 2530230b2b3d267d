"""Parsing of ground truth as one whole number: hand-written cases in formats of public data."""

import time

import pytest

from speed_async.environments.numeric_answer import answer_number, last_number
from speed_async.environments.whole_number import whole_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("27", 27),
        ("27.0", 27),
        ("-0.0", 0),
        ("+8", 8),
        ("\u22127", -7),
        (".0000672", 0.0000672),
        ("058", 58),
        ("58,500", 58500),
        (r"10,\!080", 10080),
        (r"11,\! 111,\! 111,\! 100", 11111111100),
        (r"1{,}008{,}016", 1008016),
        (r"10\,080", 10080),
        (r"\$32,\!348", 32348),
        (r"\$ 251.60", 251.6),
        ("-$5", -5),
        ("\u20ac5", 5),
        ("$-5$", -5),
        (r"\(5\)", 5),
        ("3/4", 0.75),
        ("-3 / 4", -0.75),
        (r"\frac{3}{4}", 0.75),
        (r"-\dfrac{35}{9}", -35 / 9),
        (r"- \frac 32", -1.5),
        (r"\tfrac43", 4 / 3),
        (r"\frac9{19}", 9 / 19),
        (r"\frac{-7}{23}", -7 / 23),
        (r"\frac{270}7\text{ degrees}", 270 / 7),
        (r"\dfrac{1}{29,\!322,\!216}", 1 / 29322216),
        ("1.5e-3", 0.0015),
        (r"6.72 \times 10^{-5}", 6.72e-5),
        (r"1.2\cdot10^3", 1200),
        (r"90^\circ", 90),
        (r"22.5^{\circ}", 22.5),
        ("20%", 20),
        (r"237.5 \%", 237.5),
        ("72 clips", 72),
        ("72 clips.", 72),
        ("5 cm", 5),
        ("5cm^2", 5),
        (r"864 \mbox{ inches}^2", 864),
        (r"2 \text{ euros}", 2),
        (r"34\text{ sq. units}", 34),
        (r"5\text{ m}^{2}", 5),
        (r"\mathbf{2340}", 2340),
        (r"\text{17}", 17),
        ("**17.**", 17),
        (" 5. ", 5),
    ],
)
def test_number_with_unit_is_parsed(text: str, number: float) -> None:
    assert whole_number(text) == pytest.approx(number, rel=1e-12)
    assert last_number(rf"2 + 2, so \boxed{{{text}}}") == whole_number(text)
    assert last_number(f"2 + 2\n#### {text}") == whole_number(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "-",
        "blue",
        "(15,-29)",
        "(3, 4)",
        "(1,234)",
        "(42)",
        "1,2",
        "1,-2",
        "3, 5, 7",
        "-2,1",
        "(3,4]",
        r"(0,9) \cup (9,36)",
        r"x \in [-2,7]",
        r"\{1\pm\sqrt{5},-2\}",
        r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
        r"\left( 3, \frac{\pi}{2} \right)",
        r"(99, \pi/2)",
        "x=5",
        "y = 2x + 3",
        "5x - 7y + 11z + 4 = 0",
        "2k",
        "2 k",
        "9y",
        "3 xyz",
        "6 - 5i",
        "1+274i",
        r"11\sqrt2",
        r"3\sqrt{13}",
        r"\sqrt{51}",
        r"-\frac{\pi}{6}",
        r"\frac{20000}{\pi}",
        r"\frac{11+9a}{20}",
        r"7\pi",
        "7 pi",
        r"1 \pm \sqrt{19}",
        "52_8",
        "4210_{5}",
        "2^{99}",
        "5r^5",
        "5!",
        "2*5",
        "5 - 3",
        "10-20",
        r"1\frac{4}{5}",
        r"137 \frac{1}{2}",
        "1 1/2",
        "3/0",
        r"\frac{3}{0}",
        "3/4/2020",
        "5 million",
        "2 dozen",
        r"5\text{ hundred}",
        "5 and 6",
        "2 or 3",
        r"6, 8\text{, and }10",
        r"\approx 8.24",
        "4:51",
        "1 : 2",
        "$3$4",
        "5 6",
        "1.2.3",
        "1e999",
        r"10^{5}",
        "the answer is 5",
        "5\u00b2",
        "7\u03c0",
        "1\u00bd",
        "2\u221a3",
        "9" * 2000,
    ],
)
def test_other_texts_return_none(text: str) -> None:
    assert whole_number(text) is None
    assert answer_number(text) is None
    assert last_number(rf"I think that \boxed{{{text}}}") is None


def test_ground_truth_is_taken_from_box_or_mark() -> None:
    assert answer_number("3 * 6 = 18\n#### 1,800") == 1800
    assert answer_number(r"We add 3 and 4, so \boxed{7}.") == 7
    assert answer_number("3 * 6 = 18") is None
    assert answer_number("3 * 6 = 18\n####") is None


@pytest.mark.parametrize(
    "text",
    [
        r"11\sqrt2",
        r"-\frac{\pi}{6}",
        "52_8",
        "(15,-29)",
        "(3, x)",
        "(3,4]",
        r"\{2,3\}",
        r"(2,12) \cup (12,102)",
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        r"\frac{11+9a}{20}",
        r"\frac{\sqrt6}2",
        "2k",
        "12-p",
        "17t -10",
        "4:51",
        r"6.7 \times 10^{-5}",
        r"\tan \theta = 2\theta",
        r"g(x)\leq 82",
        "2\u221a3",
        "5\u00b2",
        "7\u03c0",
        "1\u00bd",
    ],
)
def test_unmarked_number_within_an_expression_is_not_an_answer(text: str) -> None:
    assert last_number(f"The answer is {text}") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"The answer is -\frac{35}{9}.", -35 / 9),
        (r"so it is \frac12", 0.5),
        (r"an angle of 30^\circ", 30),
        (r"an area of 864 \mbox{ inches}^2", 864),
        ("(I checked, and it is 5)", 5),
        ("Step 2: 5", 5),
        ("first 3, then 4", 4),
        ("72 clips. So she", 72),
    ],
)
def test_unmarked_answer_is_the_last_number(text: str, number: float) -> None:
    assert last_number(text) == pytest.approx(number, rel=1e-12)


def test_long_answers_are_rejected_within_two_seconds() -> None:
    began_s = time.thread_time()
    for text in ("5" + " lbs" * 240 + "!", "1,111" * 190, "1" + " " * 990 + "x", "5" * 10**6):
        assert whole_number(text) is None
    for text in ("(" + "1," * 30_000, r"\frac" * 20_000, r"\text{" * 20_000, "5^{" * 20_000):
        last_number(text)
    assert time.thread_time() - began_s < 2.0
