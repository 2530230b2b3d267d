"""The value of --suite: NAME, NAME=PATH or PATH, separated by commas."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from speed_async.config.hub_id import is_hub_id
from speed_async.config.sections.evaluate import HELD_OUT, SuiteConfig
from speed_async.errors import SpeedAsyncError
from speed_async.evaluation.protocols import PROTOCOLS

DATA_FOLDER = Path("data")
"""Where `speed-async data prepare` puts data sets."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SUFFIXES = re.compile(r"(\.(jsonl?|ndjson|csv|parquet|gz|bz2|xz|zst))+$", re.IGNORECASE)


def parse_suites(
    texts: Sequence[str], configured: Mapping[str, SuiteConfig], *, base: Path = Path()
) -> list[SuiteConfig]:
    """Suites with their names and paths; `configured` are those of a run, by name.

    `base` is the folder that holds `data/`. Raises SpeedAsyncError for a name that is not found or
    is given twice.
    """
    suites: list[SuiteConfig] = []
    for text in (part.strip() for each in texts for part in each.split(",")):
        if not text:
            continue
        suite = configured.get(text) or _parse(text, configured, base)
        if any(each.name == suite.name for each in suites):
            raise suite_error(text, f"'{suite.name}' is given twice; name one of them: NAME=PATH")
        suites.append(suite)
    return suites


def suite_error(text: str, remedy: str) -> SpeedAsyncError:
    return SpeedAsyncError(f"--suite {text}: {remedy}")


def _parse(text: str, configured: Mapping[str, SuiteConfig], base: Path) -> SuiteConfig:
    name, equals, path = text.partition("=")
    if equals and _NAME.fullmatch(name):
        return SuiteConfig(name=name, path=_existing(text, path))
    if text == HELD_OUT:
        return SuiteConfig(name=HELD_OUT, path="")
    prepared = base / DATA_FOLDER / text
    if _NAME.fullmatch(text) and prepared.is_dir():
        return SuiteConfig(name=text, path=str(prepared.resolve()))
    if Path(text).expanduser().exists() or "/" in text:
        return SuiteConfig(name=_name_of(text), path=_existing(text, text))
    raise suite_error(text, _unknown(text, configured, base))


def _existing(text: str, path: str) -> str:
    found = Path(path).expanduser()
    if found.exists():
        return str(found.resolve())
    if is_hub_id(path) and not _SUFFIXES.search(path):
        return path
    raise suite_error(text, f"'{path}' does not exist: give a file or a folder")


def _name_of(path: str) -> str:
    """The name of a file without the suffixes of data files."""
    name = _SUFFIXES.sub("", Path(path).expanduser().resolve().name)
    if not _NAME.fullmatch(name):
        raise suite_error(path, "its name cannot be used: give NAME=PATH")
    return name


def _unknown(name: str, configured: Mapping[str, SuiteConfig], base: Path) -> str:
    folder = base / DATA_FOLDER
    prepared = sorted(each.name for each in folder.glob("*") if each.is_dir())
    published = {suite for protocol in PROTOCOLS.values() for suite in protocol.suites}
    known = sorted({*prepared, *published, *configured})
    if name in published:
        return (
            f"{folder / name} does not exist: `speed-async data prepare {name}` makes it, or give "
            f"its file: {name}=PATH"
        )
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    here = ", ".join(sorted({*prepared, *configured}))
    one_of = f"one of {here} (prepared in {folder}, or suites of the run), " if here else ""
    return f"unknown suite; {hint}give {one_of}a path, or NAME=PATH"
