"""What a data set is prepared from: a local file, a folder, or the Hugging Face hub."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from speed_async.environments.dataset.columns import Columns, recognise_columns
from speed_async.environments.dataset.preparation.sources import Source
from speed_async.environments.dataset.reading import (
    RawRow,
    count_rows,
    dataset_rows,
    file_format,
    first_record,
    open_hub,
    read_rows,
)
from speed_async.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """The published rows, identified by their bytes."""

    description: str
    """As the data card names it: the name of the file, or the hub id."""
    format: str
    size_bytes: int
    sha256: str
    columns: Columns
    num_rows: int | None
    """None when it is known only after reading."""
    path: Path | None
    """Of the file; None for a loaded data set."""
    dataset: "Dataset | None"

    def rows(self) -> Iterator[RawRow]:
        """Raises DataError when the file is damaged."""
        if self.path is not None:
            return read_rows(self.path, self.columns.top_level)
        assert self.dataset is not None
        return dataset_rows(self.dataset, self.columns.top_level)


def open_input(source: Source, path: Path | None) -> Input:
    """The file or folder at `path`, or the source's data set on the hub. Raises DataError."""
    if path is None or path.is_dir():
        return _loaded(source, path)
    kind = file_format(path)
    return Input(
        description=path.name,
        format=kind,
        size_bytes=path.stat().st_size,
        sha256=sha256_of([path]),
        columns=recognise_columns(first_record(path), where=f"data file '{path}'"),
        num_rows=count_rows(path),
        path=path,
        dataset=None,
    )


def _loaded(source: Source, folder: Path | None) -> Input:
    name = source.hub if folder is None else str(folder)
    dataset = open_hub(
        name,
        config=source.config if folder is None else None,
        split=source.split,
        remedy="pass --from FILE with one of its files",
    )
    if not len(dataset):
        raise DataError(f"data set '{name}' has no rows: pass --from FILE")
    files = [Path(str(each["filename"])) for each in dataset.cache_files]
    return Input(
        description=name if folder is None else folder.name,
        format="data set of the hub" if folder is None else "folder",
        size_bytes=sum(file.stat().st_size for file in files),
        sha256=sha256_of(files),
        columns=recognise_columns(dataset[0], where=f"data set '{name}'"),
        num_rows=len(dataset),
        path=None,
        dataset=dataset,
    )


def sha256_of(paths: Iterable[Path]) -> str:
    """The digest of the content of files, one after another. Raises OSError."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
