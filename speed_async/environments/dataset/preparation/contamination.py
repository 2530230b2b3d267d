"""Finds training problems that are also, or share passages with, evaluation problems."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from speed_async.environments.dataset.preparation.words import (
    ngrams,
    normalised_text,
    plain_words,
)

PASSAGE_WORDS = 13
MAX_ROWS_OF_PASSAGE = 10
"""A passage that more training problems contain is a common phrase, and is ignored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSet:
    """The problems of a prepared evaluation set."""

    name: str
    sha256: str
    """Of its file."""
    ids: Sequence[str]
    problems: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """The training problem at `index` and the problem of an evaluation set that it repeats."""

    index: int
    evaluation_set: str
    problem_id: str
    share: float
    """1.0 when the normalised texts are equal; else the share of the passages of the evaluation
    problem that the training problem contains."""
    passage: str = ""
    """One shared run of PASSAGE_WORDS words; "" when the normalised texts are equal."""

    @property
    def same_text(self) -> bool:
        return not self.passage


def overlaps(problems: Iterable[str], sets: Sequence[EvaluationSet]) -> list[Overlap]:
    """Each overlap of a training problem with an evaluation set, the largest per set, in order.

    Two problems overlap when their normalised texts (words.py) are equal or they share a passage of
    13 words (Brown et al. 2020, appendix C, which also ignores passages of more than 10 documents).
    """
    if not sets:
        return []
    texts, passages, num_passages = _index(sets)
    same: dict[int, set[_Problem]] = {}
    shared: dict[int, set[str]] = {}
    for index, problem in enumerate(problems):
        equal = texts.get(normalised_text(problem))
        if equal is not None:
            same[index] = equal
        common = _passages(problem) & passages.keys()
        if common:
            shared[index] = common
    num_rows = Counter(passage for common in shared.values() for passage in common)
    found: list[Overlap] = []
    for index in sorted(same.keys() | shared.keys()):
        rare = [
            passage
            for passage in sorted(shared.get(index, ()))
            if num_rows[passage] <= MAX_ROWS_OF_PASSAGE
        ]
        equal = _equal_overlaps(index, same.get(index, set()))
        partial = _partial_overlaps(index, rare, passages, num_passages)
        found += (partial | equal).values()
    return found


_Problem = tuple[str, str]
"""The name of an evaluation set, and the id of a problem in it."""
_Places = Mapping[str, set[_Problem]]
"""The problems that contain a text."""


def _index(sets: Sequence[EvaluationSet]) -> tuple[_Places, _Places, Counter[_Problem]]:
    """The problems by normalised text and by passage, and the number of passages of each."""
    texts: defaultdict[str, set[_Problem]] = defaultdict(set)
    passages: defaultdict[str, set[_Problem]] = defaultdict(set)
    num_passages: Counter[_Problem] = Counter()
    for each in sets:
        for problem_id, problem in zip(each.ids, each.problems, strict=True):
            key = (each.name, problem_id)
            texts[normalised_text(problem)].add(key)
            for passage in _passages(problem):
                passages[passage].add(key)
                num_passages[key] += 1
    return dict(texts), dict(passages), num_passages


def _equal_overlaps(index: int, equal: set[_Problem]) -> dict[str, Overlap]:
    return {
        name: Overlap(index=index, evaluation_set=name, problem_id=problem_id, share=1.0)
        for name, problem_id in sorted(equal, reverse=True)
    }


def _partial_overlaps(
    index: int, rare: Sequence[str], passages: _Places, num_passages: Counter[_Problem]
) -> dict[str, Overlap]:
    """The problem of each evaluation set of which the row contains the largest share."""
    contained: defaultdict[_Problem, list[str]] = defaultdict(list)
    for passage in rare:
        for key in passages[passage]:
            contained[key].append(passage)
    shares = {key: len(each) / num_passages[key] for key, each in contained.items()}
    return {
        key[0]: Overlap(
            index=index,
            evaluation_set=key[0],
            problem_id=key[1],
            share=shares[key],
            passage=contained[key][0],
        )
        for key in sorted(shares, key=lambda key: (shares[key], key))
    }


def _passages(problem: str) -> set[str]:
    words = plain_words(problem)
    return ngrams(words, PASSAGE_WORDS) if len(words) >= PASSAGE_WORDS else set()
