"""Which part of a completion is its answer under `task.match = "math"`."""

import time

from speed_async.environments.mathematics.extraction import math_answer


def test_the_last_box_decides() -> None:
    assert math_answer(r"\boxed{3}, no: $\boxed{\frac{1}{2}}$. <answer>7</answer> #### 8") == (
        r"\frac{1}{2}"
    )
    assert math_answer(r"\boxed{\boxed{5}}") == "5"


def test_an_empty_last_box_is_no_answer() -> None:
    for text in (r"\boxed{}", r"\boxed{5} then \boxed{ }", "5\n\\boxed{}\n#### 5"):
        assert math_answer(text) is None


def test_an_unclosed_last_box_ends_with_its_line() -> None:
    assert math_answer(r"The value is $\boxed{3$.") == "3"
    assert math_answer(r"The value is $\boxed{.5$.") == ".5"
    assert math_answer("\\boxed{7} and \\boxed{\\frac{1}{2}\nso it is") == r"\frac{1}{2}"


def test_tags_and_marks_follow_boxes() -> None:
    assert math_answer("<answer>17</answer> no, <answer> 18 </answer>\n#### 3") == "18"
    assert math_answer("2 * 9 = 18\n#### 18\n") == "18"


def test_a_stated_answer_ends_with_its_sentence() -> None:
    assert math_answer("The answer is 41.5. I hope it is correct.") == "41.5"
    assert math_answer("**Answer:** $x = 5$.\nDone") == "x = 5"
    assert math_answer("the answer is 3\nthe final answer is: **4**") == "4"


def test_without_a_mark_the_last_line_is_the_answer_and_no_number_is_taken_out_of_it() -> None:
    assert math_answer("We add.\n\n$42$.\n") == "42"
    assert math_answer("-1 + exp(16)") == "-1 + exp(16)"
    assert math_answer("So the total is 42.") == "So the total is 42"
    assert math_answer(" \n ") is None


def test_extraction_is_linear_in_the_text() -> None:
    texts = ["\\boxed{", "\\boxed{}", "<answer>", "</answer><answer>", "answer is ", "$", "{", "("]
    start_s = time.thread_time()
    for text in texts:
        math_answer(text * (1_000_000 // len(text)))
    assert time.thread_time() - start_s < 30
