"""The steps after the selection of rows: holding out, near duplicates, contamination.

Each takes rows and returns those that are left, with a record of what it found.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from speed_async.environments.dataset.preparation.contamination import (
    EvaluationSet,
    Overlap,
    overlaps,
)
from speed_async.environments.dataset.preparation.near_duplicates import near_duplicates
from speed_async.environments.dataset.preparation.progress import track
from speed_async.environments.dataset.preparation.rejects import Rejects
from speed_async.environments.dataset.preparation.selection import NumberedRow
from speed_async.environments.dataset.preparation.sources import (
    HELD_OUT_SEED,
    NUM_HELD_OUT,
    Source,
)
from speed_async.environments.dataset.preparation.words import digest
from speed_async.errors import DataError

NEAR_DUPLICATE = "near duplicate of an earlier row, with the same answer"
OVERLAP = "overlaps with an evaluation set"
MAX_EXAMPLES = 5

Rows = list[NumberedRow]


@dataclass(frozen=True, kw_only=True, slots=True)
class NearDuplicates:
    """The number of rows that resemble an earlier row."""

    dropped: bool
    """Whether those with the same answer are dropped."""
    same_answer: int
    other_answer: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Contamination:
    """The rows that overlap with one evaluation set. The three numbers have no row in common."""

    evaluation_set: str
    sha256: str
    removed: bool
    same_text: int
    """Rows with the text of an evaluation problem."""
    half: int
    """Rows with at least half of the passages of an evaluation problem."""
    passage: int
    """Rows that share fewer passages."""
    problems: int
    """Distinct evaluation problems that rows of the first two kinds repeat."""
    examples: Sequence[Overlap]

    @property
    def num_rows(self) -> int:
        return self.same_text + self.half + self.passage


def part_of(rows: Rows, source: Source) -> Rows:
    """The rows of the source's part; all when it has no parts.

    Held out are the 1,000 problems whose hash of seed and text is smallest: neither the order of
    rows nor a repetition makes a difference. Raises DataError when there are no more than 1,000.
    """
    if source.part == "all":
        return rows
    if len(rows) <= NUM_HELD_OUT:
        raise DataError(
            f"data set '{source.name}': {NUM_HELD_OUT:,} problems are held out, and the input has "
            f"{len(rows):,} distinct usable problems: pass the whole published file"
        )

    def rank(index: int) -> int:
        return digest(f"{HELD_OUT_SEED}\n{rows[index].row.prompt}")

    held_out = set(sorted(range(len(rows)), key=rank)[:NUM_HELD_OUT])
    return [
        row for index, row in enumerate(rows) if (index in held_out) == (source.part == "held out")
    ]


def without_near_duplicates(
    rows: Rows, source: Source, rejects: Rejects
) -> tuple[Rows, NearDuplicates]:
    """Counts rows that resemble an earlier one; drops those with its answer if the source says so.

    Similar problems with different answers are kept: they differ in their numbers.
    """
    pairs = list(near_duplicates([each.row for each in rows]))
    same = {pair.index: pair for pair in pairs if pair.same_answer}
    found = NearDuplicates(
        dropped=source.drops_near_duplicates,
        same_answer=len(same),
        other_answer=len(pairs) - len(same),
    )
    if not source.drops_near_duplicates:
        return rows, found
    for index, pair in same.items():
        detail = f"row {rows[pair.first].number}, similarity {pair.similarity:.2f}"
        _reject(rejects, rows[index], NEAR_DUPLICATE, detail)
    return [row for index, row in enumerate(rows) if index not in same], found


def without_contamination(
    rows: Rows, sets: Sequence[EvaluationSet], removed: Sequence[str], rejects: Rejects
) -> tuple[Rows, list[Contamination]]:
    """Counts the overlaps with each evaluation set; drops those with the sets named `removed`."""
    problems = track((each.row.prompt for each in rows), "comparing with evaluations", len(rows))
    found = overlaps(problems, sets)
    dropped: set[int] = set()
    for overlap in found:
        if overlap.evaluation_set in removed and overlap.index not in dropped:
            dropped.add(overlap.index)
            detail = f"{overlap.evaluation_set}, problem {overlap.problem_id}: "
            detail += f"'{overlap.passage}'" if overlap.passage else "same text"
            _reject(rejects, rows[overlap.index], OVERLAP, detail)
    by_set = [
        _contamination(each, [one for one in found if one.evaluation_set == each.name], removed)
        for each in sets
    ]
    return [row for index, row in enumerate(rows) if index not in dropped], by_set


def _contamination(
    each: EvaluationSet, found: Sequence[Overlap], removed: Sequence[str]
) -> Contamination:
    serious = [overlap for overlap in found if overlap.share >= 0.5]
    same_text = sum(overlap.same_text for overlap in found)
    return Contamination(
        evaluation_set=each.name,
        sha256=each.sha256,
        removed=each.name in removed,
        same_text=same_text,
        half=len(serious) - same_text,
        passage=len(found) - len(serious),
        problems=len({overlap.problem_id for overlap in serious}),
        examples=sorted(serious, key=lambda overlap: -overlap.share)[:MAX_EXAMPLES],
    )


def _reject(rejects: Rejects, row: NumberedRow, reason: str, detail: str) -> None:
    rejects.add(row.number, reason, detail=detail, prompt=row.row.prompt, answer=row.row.answer)
