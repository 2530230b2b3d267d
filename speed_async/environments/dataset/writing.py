"""Writes the usable rows of a source to an Arrow file, and counts the others by reason."""

import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from speed_async.config.hub_id import is_hub_id
from speed_async.config.sections.sources import PLACEHOLDER, SourceConfig, names_in
from speed_async.config.whole_file import write_atomically
from speed_async.environments.dataset.columns import (
    DatasetRow,
    RowError,
    has_column,
    read_row,
    recognise_columns,
    value_at,
)
from speed_async.environments.dataset.places import TRAIN, SourcePlace
from speed_async.environments.dataset.reading import (
    RawRow,
    dataset_rows,
    first_record,
    open_hub,
    read_rows,
)
from speed_async.environments.matching import MatchKind, matching
from speed_async.environments.task import PromptsDigest
from speed_async.errors import DataError

BATCH_ROWS = 8192
MAX_EXAMPLES = 5
MAX_UNUSABLE_SHARE = 0.5
"""A source with a larger share of unusable rows is an error: its columns are probably wrong."""
PROMPT = "prompt"
ROW_FIELDS = ("prompt", "answer", "level", "source", "id")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsReport:
    num_read: int
    num_usable: int
    unusable: dict[str, int]
    """Number of unusable rows by reason, the most frequent first."""
    examples: list[str]
    """The first unusable rows, each with its number and reason."""
    columns: dict[str, str]
    """The columns of the source that were read, by their role."""
    digest: str
    """Of all usable rows (PromptsDigest)."""


def write_rows(
    source: SourceConfig, match: MatchKind, place: SourcePlace, *, arrow: Path, record: Path
) -> None:
    """Write `arrow`, then `record` (its RowsReport as JSON), each as a whole.

    Raises DataError when no row, or less than MAX_UNUSABLE_SHARE of the rows, are usable.
    """
    part = arrow.with_suffix(f".{os.getpid()}-{time.monotonic_ns()}.part")
    try:
        report = _write(source, match, place, part)
        _check(source, report)
        part.replace(arrow)
    finally:
        part.unlink(missing_ok=True)
    write_atomically(record, json.dumps(asdict(report)))


def formatted(text: str, prompt: str, record: Mapping[str, object]) -> str:
    r"""`text` with `{prompt}` and the names of columns in braces replaced, in one pass.

    Other braces are kept: `\boxed{}`, `\frac{1}{2}`, `x^{n}` if there is no column n. Raises
    RowError if a named column has no value.
    """
    missing = [n for n in names_in(text) if n != PROMPT and value_at(record, n) is None]
    if missing:
        raise RowError(f"column {missing[0]!r} of the format has no value")

    def value(match: re.Match[str]) -> str:
        found = prompt if match[1] == PROMPT else value_at(record, match[1])
        return match[0] if found is None else str(found)

    return PLACEHOLDER.sub(value, text)


def _write(source: SourceConfig, match: MatchKind, place: SourcePlace, part: Path) -> RowsReport:
    import pyarrow as pa

    schema = pa.schema(
        [(name, pa.string()) for name in ("prompt", "answer", "level", "metadata")]
        + [(name, pa.uint64()) for name in ("prompt_key", "answer_key")]
    )
    selection = _Selection(source, match, place)
    digest = PromptsDigest()
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        usable = selection.usable()
        while batch := list(itertools.islice(usable, BATCH_ROWS)):
            for row in batch:
                digest.add(row["prompt"], row["answer"])
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    return selection.report(digest.hexdigest())


class _Selection:
    """Reads a source once and yields its usable rows as the columns of the Arrow file."""

    def __init__(self, source: SourceConfig, match: MatchKind, place: SourcePlace) -> None:
        """Raises DataError when the columns are not found, or there are no rows."""
        self._source = source
        self._match: MatchKind = match
        first, self._read = _open(source, place)
        chosen = {role: name for role, name in source.columns.items() if role in ROW_FIELDS}
        self._columns = recognise_columns(first, chosen, where=f"data set '{source.path}'")
        self._others = {k: name for k, name in source.columns.items() if k not in ROW_FIELDS}
        for role, name in self._others.items():
            if not has_column(first, name):
                raise DataError(
                    f"data set '{source.path}': columns.{role} = {name!r} is not among its columns "
                    f"({', '.join(map(repr, first))}): correct it"
                )
        for name in names_in(source.format):
            if name != PROMPT and not has_column(first, name):
                raise DataError(
                    f"data set '{source.path}': format has {{{name}}}, which is neither {{prompt}} "
                    f"nor one of its columns ({', '.join(map(repr, first))}): correct it, or leave "
                    "the braces out"
                )
        named = [*self._others.values(), *PLACEHOLDER.findall(source.format)]
        used = [name.partition(".")[0] for name in named if has_column(first, name)]
        self._used = list(dict.fromkeys((*self._columns.top_level, *used)))
        self._num_read = 0
        self._unusable: Counter[str] = Counter()
        self._examples: list[str] = []

    def usable(self) -> Iterator[dict[str, Any]]:
        for raw in self._read(self._used):
            self._num_read += 1
            try:
                yield self._row(raw)
            except RowError as error:
                reason = str(error)
                self._unusable[reason] += 1
                if len(self._examples) < MAX_EXAMPLES:
                    self._examples.append(f"row {raw.number}: {reason}")

    def report(self, digest: str) -> RowsReport:
        columns = asdict(self._columns) | self._others
        return RowsReport(
            num_read=self._num_read,
            num_usable=self._num_read - self._unusable.total(),
            unusable=dict(self._unusable.most_common()),
            examples=self._examples,
            columns={role: name for role, name in columns.items() if name},
            digest=digest,
        )

    def _row(self, raw: RawRow) -> dict[str, Any]:
        if raw.error:
            raise RowError(raw.error)
        row = read_row(raw.record, self._columns)
        if matching(self._match).answer_error(row.answer):
            raise RowError(f"the answer has no form that match = {self._match!r} can compare")
        text = formatted(self._source.format, row.prompt, raw.record)
        try:
            prompt_key = xxhash.xxh3_64_intdigest(" ".join(text.split()).encode())
        except UnicodeEncodeError:
            raise RowError("the formatted prompt contains a lone surrogate") from None
        return {
            "prompt": text,
            "answer": row.answer,
            "level": row.level.encode(errors="replace").decode(),
            "metadata": self._metadata(row, raw.record),
            "prompt_key": prompt_key,
            "answer_key": xxhash.xxh3_64_intdigest(row.answer.encode()),
        }

    def _metadata(self, row: DatasetRow, record: Mapping[str, object]) -> str:
        known = {"source": row.source, "id": row.id}
        found: dict[str, object] = {name: value for name, value in known.items() if value}
        found |= {name: value_at(record, column) for name, column in self._others.items()}
        return json.dumps(found, default=str) if found else ""


def _open(
    source: SourceConfig, place: SourcePlace
) -> tuple[Mapping[str, object], Callable[[list[str]], Iterator[RawRow]]]:
    """The first row of a source, and a function that reads these columns of all rows."""
    if place.files:
        first = first_record(place.files[0])
        return first, lambda used: (row for path in place.files for row in read_rows(path, used))
    if not is_hub_id(source.path):
        raise DataError(f"data set '{source.path}' does not exist: correct its path")
    dataset = open_hub(source.path, config=source.subset, split=source.split or TRAIN)
    if not len(dataset):
        raise DataError(f"data set '{source.path}' has no rows: give one that has some")
    return dataset[0], lambda used: dataset_rows(dataset, used)


def _check(source: SourceConfig, report: RowsReport) -> None:
    num_unusable = report.num_read - report.num_usable
    if report.num_usable and num_unusable <= MAX_UNUSABLE_SHARE * report.num_read:
        return
    listed = "".join(f"\n  {count:,}: {reason}" for reason, count in report.unusable.items())
    examples = "".join(f"\n  {example}" for example in report.examples)
    raise DataError(
        f"data set '{source.path}': {num_unusable:,} of {report.num_read:,} rows cannot be used, "
        f"more than {MAX_UNUSABLE_SHARE:.0%}:{listed}\nThe first are:{examples}\n"
        f"It was read with columns = {report.columns}: name others with `columns`, choose another "
        "`match`, or clean it with `speed-async data prepare`"
    )
