from collections.abc import Sequence

from speed_async.environments.dataset.preparation.contamination import EvaluationSet, overlaps

LONG = (
    "A train leaves the old station at noon with ninety passengers and arrives in the valley "
    "after three hours. How many passengers arrive?"
)
"""23 words: 11 passages of 13 words."""


def evaluation_set(*problems: str, name: str = "suite") -> EvaluationSet:
    ids = [f"{name}-{index}" for index in range(len(problems))]
    return EvaluationSet(name=name, sha256="", ids=ids, problems=problems)


def found(problems: Sequence[str], *sets: EvaluationSet) -> list[tuple[int, str, float]]:
    return [
        (overlap.index, overlap.problem_id, round(overlap.share, 2))
        for overlap in overlaps(problems, sets)
    ]


def test_texts_that_differ_in_markup_only_are_the_same() -> None:
    suite = evaluation_set("Find $\\dfrac{1}{2} + x$.")
    problems = ["find \\frac{1}{2}+x", "Find $\\frac{1}{2} - x$", "Find $\\frac{1}{3} + x$"]
    assert found(problems, suite) == [(0, "suite-0", 1.0)]


def test_a_problem_that_contains_thirteen_words_of_another_overlaps_with_it() -> None:
    words = LONG.split()
    twelve, thirteen = " ".join(words[:12]), " ".join(words[:13])
    problems = [f"{twelve} now", f"Once {thirteen} now", f"{LONG} Today?"]
    assert found(problems, evaluation_set(LONG)) == [(1, "suite-0", 0.09), (2, "suite-0", 1.0)]


def test_a_passage_of_more_than_ten_problems_is_ignored() -> None:
    passage = " ".join(LONG.split()[:13])
    problems = [f"{passage} number {index}" for index in range(11)]
    assert found(problems[:10], evaluation_set(LONG))
    assert not found(problems, evaluation_set(LONG))


def test_each_evaluation_set_is_reported_with_its_most_similar_problem() -> None:
    some = evaluation_set(" ".join(LONG.split()[2:18]), LONG, name="some")
    other = evaluation_set("unrelated", LONG, name="other")
    assert found([LONG], some, other) == [(0, "other-1", 1.0), (0, "some-1", 1.0)]


def test_the_code_of_a_drawing_is_no_passage() -> None:
    drawing = "[asy] draw a b c d e f g h i j k l m n o p; [/asy]"
    assert not found([f"Find x. {drawing}"], evaluation_set(f"Find the area. {drawing}"))
