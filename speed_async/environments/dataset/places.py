"""Where the rows of a source are: files on this machine, or the hub; and where they are kept."""

import os
from dataclasses import dataclass
from pathlib import Path

from speed_async.config.sections.sources import SourceConfig
from speed_async.errors import DataError

TRAIN = "train"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePlace:
    files: tuple[Path, ...] = ()
    """Empty for a data set of the hub."""
    stamps: tuple[tuple[int, ...], ...] = ()
    """Of each file: device, inode, size in bytes, mtime and ctime in ns."""


def locate(source: SourceConfig) -> SourcePlace:
    """The files of a source, if its path exists. Raises DataError for a folder without any."""
    path = Path(source.path)
    if not path.exists():
        return SourcePlace()
    files = _files_of_folder(path, source.split) if path.is_dir() else (path,)
    return SourcePlace(files=files, stamps=tuple(map(_stamp, files)))


def rows_folder() -> Path:
    """Folder of the Arrow files made of sources: in the cache of the library `datasets`."""
    from huggingface_hub.constants import HF_HOME

    cache = os.environ.get("HF_DATASETS_CACHE") or os.path.join(HF_HOME, "datasets")
    return Path(cache).expanduser() / "speed_async"


def _files_of_folder(folder: Path, split: str | None) -> tuple[Path, ...]:
    """The only parquet file, or the shards of the split: `train.parquet`, `train-0001.parquet`."""
    found = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    if len(found) == 1 and split is None:
        return tuple(found)
    wanted = split or TRAIN
    files = tuple(f for f in found if f.stem == wanted or f.stem.startswith(f"{wanted}-"))
    if not files:
        names = ", ".join(path.name for path in found[:5]) or "none"
        raise DataError(
            f"data folder '{folder}' has no parquet file of split '{wanted}' (its parquet files: "
            f"{names}): set `split`, or give the path of one file"
        )
    return files


def _stamp(path: Path) -> tuple[int, ...]:
    facts = path.stat()
    return (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
