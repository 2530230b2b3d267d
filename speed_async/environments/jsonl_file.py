"""Reads the data file of the `jsonl` task; every error includes its line and a remedy."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from speed_async.environments.dataset.answers import is_encodable, number_text
from speed_async.errors import DataError

MAX_LISTED_KEYS = 8
MAX_LISTED_LINES = 5
_OTHER_FORMATS = {
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a parquet file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
"""Formats by their leading bytes."""
_EXAMPLE = '{"prompt": "2 + 2 =", "answer": "4"}'


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRow:
    """One usable line; `extra` holds its keys other than prompt and answer."""

    line: int
    prompt: str
    answer: str
    extra: dict[str, object]

    @property
    def key(self) -> str:
        """Key that identifies equal prompts; ignores differences in white space."""
        return " ".join(self.prompt.split())


class _BadLine(Exception):
    """Why a line cannot be used."""


def read_rows(path: Path, check_answer: Callable[[str], str]) -> list[DataRow]:
    """Distinct rows in file order; a repeated prompt with the same answer is read once.

    `check_answer` returns the reason why an answer is unusable, or "". Raises DataError with the
    file and up to 5 bad lines.
    """
    _check_format(path)
    rows: dict[str, DataRow] = {}
    errors: list[str] = []
    for line, raw in _lines(path):
        try:
            row = _parse(line, raw, check_answer)
            _check_duplicate(row, rows.setdefault(row.key, row))
        except _BadLine as error:
            errors.append(f"line {line}: {error}")
    if errors:
        raise DataError(_describe(path, errors))
    if not rows:
        raise DataError(
            f"data file '{path}' is empty: write one object per line, such as {_EXAMPLE}"
        )
    return list(rows.values())


def _check_format(path: Path) -> None:
    """Raises DataError when the first bytes show a format other than JSON lines."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(f"data file '{path}' is a pipe or a device: use a regular file")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return  # reported when its lines are read
    for prefix, kind in _OTHER_FORMATS.items():
        if start.startswith(prefix):
            raise DataError(
                f"data file '{path}' is {kind}: convert it to one JSON object per line (UTF-8), "
                f"such as {_EXAMPLE}"
            )
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise DataError(
            f"data file '{path}' starts with '[', which indicates a JSON array: write one object "
            f"per line, without enclosing brackets or separating commas, such as {_EXAMPLE}"
        )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                content = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
                if content.strip():
                    yield line, content
    except FileNotFoundError:
        raise DataError(f"data file '{path}' does not exist: correct task.path") from None
    except OSError as error:
        raise DataError(
            f"data file '{path}' cannot be read ({error.strerror}): correct task.path"
        ) from error


def _parse(line: int, raw: bytes, check_answer: Callable[[str], str]) -> DataRow:
    record = _decode(raw)
    prompt, answer = _prompt(record), _answer(record)
    error = check_answer(answer)
    if error:
        raise _BadLine(error)
    extra = {key: value for key, value in record.items() if key not in ("prompt", "answer")}
    return DataRow(line=line, prompt=prompt, answer=answer, extra=extra)


def _decode(raw: bytes) -> dict[str, object]:
    try:
        record = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise _BadLine(f"not UTF-8 (byte {error.start + 1})") from None
    except (ValueError, RecursionError) as error:
        raise _BadLine(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise _BadLine(f"not a JSON object but a {type(record).__name__}")
    return record


def _prompt(record: dict[str, object]) -> str:
    prompt = _required(record, "prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise _BadLine(f"'prompt' must be a non-blank string, not {_short_repr(prompt)}")
    return _text("prompt", prompt)


def _answer(record: dict[str, object]) -> str:
    answer = _required(record, "answer")
    if isinstance(answer, float) and math.isfinite(answer):
        return number_text(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return number_text(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise _BadLine(
            f"'answer' must be a number or a non-blank string, not {_short_repr(answer)}"
        )
    return _text("answer", answer)


def _text(key: str, text: str) -> str:
    """Raises _BadLine for a lone surrogate."""
    if not is_encodable(text):
        raise _BadLine(f"'{key}' contains a lone surrogate: {_short_repr(text)}")
    return text


def _required(record: dict[str, object], key: str) -> object:
    if key not in record:
        found = ", ".join(_short_repr(each) for each in list(record)[:MAX_LISTED_KEYS]) or "none"
        raise _BadLine(f"key '{key}' is missing; the keys of this line are: {found}")
    return record[key]


def _check_duplicate(row: DataRow, first: DataRow) -> None:
    if row.answer.strip() != first.answer.strip():
        raise _BadLine(
            f"same prompt as line {first.line} with a different answer: {_short_repr(row.answer)} "
            f"instead of {_short_repr(first.answer)}"
        )


def _describe(path: Path, errors: list[str]) -> str:
    listed = "".join(f"\n  {error}" for error in errors[:MAX_LISTED_LINES])
    num_more = len(errors) - MAX_LISTED_LINES
    more = f"\n  and {num_more} more" if num_more > 0 else ""
    noun = "unusable line" if len(errors) == 1 else "unusable lines"
    return (
        f"data file '{path}' has {len(errors)} {noun}:{listed}{more}\n"
        f"Correct or remove them; each line is one object, such as {_EXAMPLE}"
    )


def _short_repr(value: object, num_characters: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= num_characters else text[: num_characters - 3] + "..."
