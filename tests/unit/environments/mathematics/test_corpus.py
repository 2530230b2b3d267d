"""The labelled corpus of benchmarks/verifier.py, judged by the exact path and by math-verify."""

from benchmarks.verifier import Pair, read_corpus
from speed_async.environments.mathematics.comparison import same_math
from speed_async.environments.mathematics.extraction import math_answer
from speed_async.environments.mathematics.fallback import fallback_verdict
from speed_async.environments.mathematics.scoring import is_correct

NOT_SENT_TO_MATH_VERIFY = ("hang", "adversarial", "extraction")
MAX_FALSE_NEGATIVES = {
    "equation": 1,
    "interval": 1,
    "matrix": 1,
    "ratio": 1,
    "function": 1,
    "extraction": 4,
    "adversarial": 3,
    "hang": 3,
    "later": 4,
}
"""By kind; docs/verifier.md explains them."""


def test_the_corpus_is_large_and_balanced() -> None:
    pairs = read_corpus()
    assert len(pairs) >= 400
    assert 0.4 <= sum(pair.label for pair in pairs) / len(pairs) <= 0.6
    assert len({(pair.prompt, pair.completion, pair.answer) for pair in pairs}) == len(pairs)


def test_no_wrong_completion_is_accepted_and_few_right_ones_are_rejected() -> None:
    false_positives: list[Pair] = []
    false_negatives: dict[str, list[str]] = {}
    for pair in read_corpus():
        verdict = is_correct(pair.completion, pair.answer)
        if verdict and not pair.label:
            false_positives.append(pair)
        if pair.label and not verdict:
            false_negatives.setdefault(pair.kind, []).append(pair.completion[-80:])
    assert not false_positives
    counts = {kind: len(texts) for kind, texts in false_negatives.items()}
    assert counts == MAX_FALSE_NEGATIVES, false_negatives


def test_the_exact_path_is_right_where_math_verify_differs() -> None:
    """On every second pair that both decide."""
    num_both = num_same = 0
    wrong: list[Pair] = []
    pairs = [pair for pair in read_corpus() if pair.kind not in NOT_SENT_TO_MATH_VERIFY]
    for pair in pairs[::2]:
        candidate = math_answer(pair.completion)
        exact = same_math(candidate or "", pair.answer)
        if exact is None:
            continue
        num_both += 1
        if fallback_verdict(candidate or "", pair.answer) == exact:
            num_same += 1
        elif exact != pair.label:
            wrong.append(pair)
    assert num_both > 300
    assert num_same > 0.85 * num_both
    assert {pair.kind for pair in wrong} <= {"interval", "ratio", "later"}
