"""results.json: the results of every suite of one folder, with the settings of each."""

import json
from pathlib import Path
from typing import Any

from speed_async.config.whole_file import write_atomically
from speed_async.errors import DataError
from speed_async.evaluation.results import SuiteResult

RESULTS_FILE = "results.json"
FORMAT = 1


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by suite, as written by `write_result`. Raises DataError."""
    path = folder / RESULTS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, not {FORMAT}")
        return content["suites"]
    except FileNotFoundError:
        raise DataError(
            f"'{folder}' has no {RESULTS_FILE}: give {_folders_to_give(folder)}"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"results '{path}' cannot be read: {error}") from None


def _folders_to_give(folder: Path) -> str:
    """What a user who gave `folder` may have meant: the evaluations of the run, if it is one."""
    if inside := sorted(folder.glob(f"evaluation/*/{RESULTS_FILE}")):
        return f"an evaluation of this run: {', '.join(str(path.parent) for path in inside)}"
    return "the folder of a finished evaluation (speed-async eval ... --out FOLDER)"


def write_result(folder: Path, result: SuiteResult, settings: dict[str, Any]) -> None:
    """Add or replace one suite. Raises OSError, and DataError for an unreadable file."""
    suites = read_results(folder) if (folder / RESULTS_FILE).exists() else {}
    suites[result.suite] = result.as_json() | {"settings": settings}
    content = {"format": FORMAT, "suites": suites}
    write_atomically(folder / RESULTS_FILE, json.dumps(content, indent=2) + "\n")
