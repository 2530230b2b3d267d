"""Selects the usable, distinct rows of an input."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from speed_async.environments.dataset.answers import is_integer
from speed_async.environments.dataset.columns import (
    Columns,
    DatasetRow,
    RowError,
    read_row,
    value_at,
)
from speed_async.environments.dataset.preparation.rejects import Rejects
from speed_async.environments.dataset.preparation.sources import Source
from speed_async.environments.dataset.preparation.words import digest
from speed_async.environments.dataset.reading import RawRow
from speed_async.environments.mathematics.scoring import math_answer_error

_PROOF = re.compile(r"\b(?:prove|proof|proofs|show that|demonstrate that)\b", re.IGNORECASE)

PROOF = "the problem asks for a proof"
NOT_AN_INTEGER = "the answer is not an integer"
UNUSABLE_ANSWER = "the math verifier cannot use the answer"
OTHER_ANSWER = "same problem as an earlier row, with another answer"


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberedRow:
    """A usable row and its number in the input, from 1."""

    number: int
    row: DatasetRow


@dataclass(kw_only=True, slots=True)
class Selection:
    """The usable, distinct rows in the order of the input."""

    rows: list[NumberedRow] = field(default_factory=list)
    num_read: int = 0
    num_exact_duplicates: int = 0
    num_instructions_removed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """The first row with a problem. `answer` is "" when it was rejected."""

    number: int
    published_answer: int
    answer: str


def select_rows(
    raw_rows: Iterable[RawRow], columns: Columns, source: Source, rejects: Rejects
) -> Selection:
    """Usable rows with distinct problems; the others go to `rejects`.

    A row whose published problem and answer equal those of an earlier row is an exact duplicate,
    which is counted only: DAPO-Math-17k has each of its rows about 100 times.
    """
    selection = Selection()
    seen: dict[int, _Seen] = {}
    for raw in raw_rows:
        selection.num_read += 1
        if raw.error:
            rejects.add(raw.number, raw.error)
            continue
        problem, answer = _published(raw.record, columns)
        first = seen.get(problem)
        if first is not None and first.published_answer == answer:
            selection.num_exact_duplicates += 1
            continue
        row = _usable(raw, columns, source, rejects)
        if first is None or not first.answer:
            seen[problem] = _Seen(
                number=raw.number, published_answer=answer, answer=row.answer if row else ""
            )
        if row is None:
            continue
        if first is None or not first.answer:
            selection.rows.append(NumberedRow(number=raw.number, row=row))
            selection.num_instructions_removed += row.had_instruction
        elif first.answer == row.answer:
            selection.num_exact_duplicates += 1
        else:
            detail = f"row {first.number} has {first.answer!r}"
            _reject(rejects, raw.number, OTHER_ANSWER, row, detail=detail)
    return selection


def _published(record: Mapping[str, object], columns: Columns) -> tuple[int, int]:
    """Digests of the problem and of the answer as published."""
    prompt = value_at(record, columns.prompt)
    text = prompt.strip() if isinstance(prompt, str) else repr(prompt)
    return digest(text), digest(repr(value_at(record, columns.answer)))


def _usable(raw: RawRow, columns: Columns, source: Source, rejects: Rejects) -> DatasetRow | None:
    try:
        row = read_row(raw.record, columns)
    except RowError as error:
        prompt, answer = (value_at(raw.record, name) for name in (columns.prompt, columns.answer))
        rejects.add(raw.number, str(error), prompt=prompt, answer=answer)
        return None
    if source.integers_only and _PROOF.search(row.prompt):
        return _reject(rejects, raw.number, PROOF, row)
    if source.integers_only and not is_integer(row.answer):
        return _reject(rejects, raw.number, NOT_AN_INTEGER, row)
    error = math_answer_error(row.answer) if source.role == "training" else ""
    if error:
        return _reject(rejects, raw.number, UNUSABLE_ANSWER, row, detail=error)
    return row


def _reject(
    rejects: Rejects, number: int, reason: str, row: DatasetRow, *, detail: str = ""
) -> None:
    rejects.add(number, reason, detail=detail, prompt=row.prompt, answer=row.answer)
