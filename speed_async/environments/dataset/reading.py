"""Reads the rows of a published data set: a file, a folder, or a data set of the Hugging Face hub.

A file is parquet, a JSON array, JSON lines or CSV with a header, and may be compressed (gzip,
bzip2, xz, zstd). Its content decides which, not its name, except for CSV.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from speed_async.environments.dataset.compression import (
    UNREADABLE,
    compression_of,
    open_decompressed,
)
from speed_async.errors import DataError, HubDataError

if TYPE_CHECKING:
    from datasets import Dataset

Format = Literal["parquet", "json array", "json lines", "csv"]
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BATCH_ROWS = 4096
_DOWNLOAD = (
    "correct its name, load it once where there is a connection, or download one of its files and "
    "give the path of that"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """One row as published, or the reason why it cannot be read."""

    number: int
    """From 1. The line, for JSON lines; the row below the header, for CSV."""
    record: dict[str, object]
    error: str = ""


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[RawRow]:
    """The rows of a file, one after another; memory does not grow with it, except a JSON array.

    `columns`: of a parquet file, only these are read. A JSON line that cannot be parsed is a row
    with an error. Raises DataError when the file cannot be read.
    """
    kind = file_format(path)
    try:
        if kind == "parquet":
            yield from _parquet_rows(path, columns)
            return
        with closing(open_decompressed(path)) as file:
            if kind == "json array":
                yield from _array_rows(path, file)
            elif kind == "json lines":
                yield from _line_rows(file)
            else:
                yield from _csv_rows(path, file)
    except UNREADABLE as error:
        raise DataError(f"data file '{path}' cannot be read ({error}): correct it") from error


def first_record(path: Path) -> dict[str, object]:
    """The first row that can be read. Raises DataError when there is none."""
    error = "it is empty"
    for row in itertools.islice(read_rows(path), 1000):
        if not row.error:
            return row.record
        error = f"row {row.number}: {row.error}"
    raise DataError(f"data file '{path}' has no rows that can be read ({error}): correct it")


def count_rows(path: Path) -> int | None:
    """The number of rows that a parquet file states; None for other files. Raises DataError."""
    if file_format(path) != "parquet" or compression_of(path) is not None:
        return None
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows


def file_format(path: Path) -> Format:
    """The format of a file. Raises DataError when it does not exist or has none of the four."""
    if path.is_dir():
        raise DataError(f"data file '{path}' is a folder: name one of its files")
    try:
        with closing(open_decompressed(path)) as file:
            start = file.read(4096)
    except FileNotFoundError:
        raise DataError(f"data file '{path}' does not exist: correct its path") from None
    except UNREADABLE as error:
        raise DataError(f"data file '{path}' cannot be read ({error}): correct it") from error
    if start.startswith(b"PAR1"):
        return "parquet"
    text = start.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if text.startswith(b"["):
        return "json array"
    if text.startswith(b"{"):
        return "json lines"
    if any(suffix.lower() in (".csv", ".tsv") for suffix in path.suffixes):
        return "csv"
    raise DataError(
        f"data file '{path}' is not parquet, a JSON array, JSON lines or CSV (named *.csv): "
        "convert it to one of them"
    )


def open_hub(
    name: str, *, config: str | None = None, split: str = "train", remedy: str = _DOWNLOAD
) -> "Dataset":
    """A data set of the hub, or of a local folder of its files, memory-mapped from the cache.

    Raises HubDataError, with this remedy, when it cannot be loaded.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(name, config, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise HubDataError(
            name,
            f"split {split!r} of subset {config!r} cannot be loaded from the Hugging Face hub or "
            f"its cache ({_first_line(error)}): {remedy}",
            is_unreachable=isinstance(error, ConnectionError),
        ) from error


def dataset_rows(dataset: "Dataset", columns: Sequence[str] | None = None) -> Iterator[RawRow]:
    """The rows of a loaded data set, in its order; only these columns of it."""
    if columns is not None:
        dataset = dataset.select_columns(list(columns))
    for number, record in enumerate(dataset, start=1):
        yield RawRow(number=number, record=dict(record))


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = itertools.count(1)
    source = io.BytesIO(open_decompressed(path).read()) if compression_of(path) else path
    try:
        # Buffered and without threads: a row group, often the whole file, is not read at once.
        with pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as file:
            for batch in file.iter_batches(
                _BATCH_ROWS, columns=list(columns) if columns else None, use_threads=False
            ):
                for record in batch.to_pylist():
                    yield RawRow(number=next(numbers), record=record)
    except pa.ArrowException as error:
        raise DataError(
            f"parquet file '{path}' cannot be read ({_first_line(error)}): download it again"
        ) from error


def _array_rows(path: Path, file: BinaryIO) -> Iterator[RawRow]:
    try:
        records = json.loads(file.read().removeprefix(_BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        raise DataError(f"data file '{path}' is not a JSON array ({error}): correct it") from None
    for number, record in enumerate(records, start=1):
        yield _row(number, record)


def _line_rows(file: BinaryIO) -> Iterator[RawRow]:
    for number, line in enumerate(file, start=1):
        content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError):
            yield RawRow(number=number, record={}, error="the line is not valid JSON")
            continue
        yield _row(number, record)


def _csv_rows(path: Path, file: BinaryIO) -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)  # a solution may exceed the default of 128 KiB
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    delimiter = "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","
    try:
        for number, record in enumerate(csv.DictReader(text, delimiter=delimiter), start=1):
            whole = None not in record and None not in record.values()
            error = "" if whole else "the row has more or fewer values than the header"
            yield RawRow(number=number, record=dict(record) if whole else {}, error=error)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"CSV file '{path}' cannot be read ({error}): correct it") from None


def _row(number: int, record: object) -> RawRow:
    if isinstance(record, dict):
        return RawRow(number=number, record=record)
    kind = type(record).__name__
    return RawRow(number=number, record={}, error=f"the row is a {kind}, not an object")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
