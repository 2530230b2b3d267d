"""Finds problems that are nearly the same text, by MinHash and locality-sensitive hashing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from speed_async.environments.dataset.columns import DatasetRow
from speed_async.environments.dataset.preparation.progress import track
from speed_async.environments.dataset.preparation.words import ngrams, normalised_text

THRESHOLD = 0.8
"""Least Jaccard similarity of the shingles of two near duplicates."""
SHINGLE_WORDS = 3
NUM_PERMUTATIONS = 128
NUM_BANDS = 16
"""Of 8 permutations each: a pair of similarity s is a candidate with probability
1 - (1 - s^8)^16, which is 0.95 at the threshold and 0.06 at 0.5."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NearDuplicate:
    """The row at `index` resembles the row at `first`, which is before it."""

    index: int
    first: int
    similarity: float
    same_answer: bool
    """Similar problems with different answers usually differ in their numbers."""


def near_duplicates(rows: Sequence[DatasetRow]) -> Iterator[NearDuplicate]:
    """Each row whose problem resembles that of an earlier row, in order.

    Of several earlier ones it names the most similar, one with the same answer if there is any.
    Candidates come from MinHash signatures (Broder 1997) in an index of locality-sensitive hashes;
    the exact Jaccard similarity of the sets of shingles decides. A pair may be missed when its
    similarity is close to the threshold; no pair below it is reported.
    """
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=THRESHOLD, num_perm=NUM_PERMUTATIONS, num_bands=NUM_BANDS)
    for position, row in track(enumerate(rows), "finding near duplicates", len(rows)):
        signature = RMinHash(num_perm=NUM_PERMUTATIONS, seed=0)
        signature.update(sorted(_shingles(row)))
        candidates = index.query(signature)
        index.insert(position, signature)
        if candidates:
            similar = _most_similar(rows, position, candidates)
            if similar is not None:
                yield similar


def _most_similar(
    rows: Sequence[DatasetRow], position: int, candidates: Sequence[int]
) -> NearDuplicate | None:
    own = _shingles(rows[position])
    pairs = [
        NearDuplicate(
            index=position,
            first=first,
            similarity=_jaccard(own, _shingles(rows[first])),
            same_answer=rows[first].answer == rows[position].answer,
        )
        for first in sorted(candidates)
    ]
    near = [pair for pair in pairs if pair.similarity >= THRESHOLD]
    return max(near, key=lambda pair: (pair.same_answer, pair.similarity), default=None)


def _shingles(row: DatasetRow) -> set[str]:
    return ngrams(normalised_text(row.prompt).split(), SHINGLE_WORDS)


def _jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)
