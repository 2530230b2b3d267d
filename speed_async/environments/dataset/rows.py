"""The usable rows of a source, memory-mapped: no process holds them in its own memory.

The first process that opens a source reads it once and writes an Arrow file (writing.py) to the
cache of `datasets` (HF_DATASETS_CACHE). Others map that file, which needs pyarrow only. The file is
written again when the source, its settings or the code that reads it change.
"""

import fcntl
import json
import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import xxhash

from speed_async.config.sections.sources import SourceConfig
from speed_async.environments.dataset.places import SourcePlace, locate, rows_folder
from speed_async.environments.dataset.writing import RowsReport, write_rows
from speed_async.environments.matching import MatchKind
from speed_async.errors import DataError
from speed_async.types import UInt64Array

FORMAT = 1
RELEASE_READS = 256
"""Reads of rows after which the mapped pages are released."""
_CODE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One usable row of a source."""

    prompt: str
    """As the model gets it: with the source's `format` applied."""
    answer: str
    """Normalised (answers.py)."""
    level: str
    metadata: dict[str, object]
    """`source` and `id` if the data set has them, and the other named `columns`."""


class MappedPages:
    """The pages of mapped Arrow files that reads have made resident.

    They count as memory of this process until they are released. A later read takes them from the
    page cache of the system, or from disk.
    """

    def __init__(self, maps: Sequence[mmap.mmap]) -> None:
        self.maps = maps
        self._num_reads = 0

    def count_read(self) -> None:
        """Release all pages once every RELEASE_READS reads."""
        self._num_reads += 1
        if self._num_reads % RELEASE_READS == 0:
            for each in self.maps:
                each.madvise(mmap.MADV_DONTNEED)


class Rows(Sequence[Row]):
    """All usable rows of a source in its order, repeated prompts included."""

    def __init__(self, table: Any, pages: MappedPages, report: RowsReport, file: Path) -> None:
        self.table = table
        """pyarrow.Table, memory-mapped: prompt, answer, level, metadata (JSON), prompt_key,
        answer_key (uint64 digests)."""
        self.pages = pages
        """Those of `table`."""
        self.report = report
        self.file = file
        """The Arrow file."""

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return row_at(self.table, self.pages, index % len(self))

    def keys(self, column: str) -> UInt64Array:
        """(N,) digests of column `prompt_key` or `answer_key`."""
        return np.asarray(self.table.column(column).to_numpy(), np.uint64)


def row_at(table: Any, pages: MappedPages, index: int) -> Row:
    """A row of a table with these pages."""
    pages.count_read()
    [record] = table.slice(index, 1).select(_FIELDS).to_pylist()
    metadata = json.loads(record.pop("metadata") or "{}")
    return Row(metadata=metadata, **record)


_FIELDS = ["prompt", "answer", "level", "metadata"]


def open_source(source: SourceConfig, match: MatchKind = "math") -> Rows:
    """The rows of a source whose answers `match` can compare.

    Safe when several processes open the same source at once. Raises DataError when the source
    cannot be read, or most of its rows are unusable.
    """
    place = locate(source)
    folder = rows_folder()
    name = _key(source, match, place)
    arrow, record = folder / f"{name}.arrow", folder / f"{name}.json"
    if not (record.is_file() and arrow.is_file()):
        with _writable(folder), _lock(folder / f"{name}.lock"):
            if not (record.is_file() and arrow.is_file()):
                sys.stderr.write(f"reading data set '{source.path}' once, to '{arrow}'\n")
                sys.stderr.flush()
                write_rows(source, match, place, arrow=arrow, record=record)
    try:
        report = RowsReport(**json.loads(record.read_text(encoding="utf-8")))
        mapped = _map(arrow)
        return Rows(_table(mapped), MappedPages([mapped]), report, arrow)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"the rows of '{source.path}' in the cache cannot be read ({error}): remove '{arrow}' "
            f"and '{record}', and they are written again"
        ) from error


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _table(mapped: mmap.mmap) -> Any:
    """The pyarrow.Table in a mapped file; nothing is copied."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()


def _key(source: SourceConfig, match: MatchKind, place: SourcePlace) -> str:
    """Name of the Arrow file: a digest of everything that its content depends on."""
    settings = source.model_dump(include=set(SourceConfig.model_fields))
    text = json.dumps([FORMAT, _code_digest(), settings, match, asdict(place)], default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())


@cache
def _code_digest() -> str:
    """Digest of the code that reads and checks rows."""
    digest = xxhash.xxh3_128()
    for path in sorted(_CODE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(
            f"the cache folder '{folder}' cannot be written ({error.strerror or error}): set the "
            "environment variable HF_DATASETS_CACHE to another folder, or make space"
        ) from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held while one process writes. Without locks (some network file systems) several processes
    write the same content, and each replaces the file as a whole."""
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def summary(place: str, report: RowsReport) -> str:
    """One line: how many rows are usable, and why others are not."""
    reasons = _reasons(report.unusable)
    return f"{place}: {report.num_usable:,} of {report.num_read:,} rows are usable{reasons}"


def _reasons(unusable: Mapping[str, int]) -> str:
    listed = "; ".join(f"{count:,}: {reason}" for reason, count in unusable.items())
    return f" ({listed})" if listed else ""
