"""The samples of one suite on disk: one JSON line each, appended, with the settings beside them.

A process that is killed loses no line that was written: the next one reads them back and continues.
`SUITE.jsonl` holds the samples and `SUITE.settings.json` what they depend on. A file can only be
continued with the same settings.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from speed_async.config.whole_file import flush, write_atomically
from speed_async.errors import DataError, SpeedAsyncError
from speed_async.types import FinishReason, VerifierOutcome

FORMAT = 1
SYNC_INTERVAL_S = 1.0
"""A power failure loses at most the lines of this interval; the death of the process loses none."""
_SHOWN_CHARS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRecord:
    """One completion and its verdict."""

    prompt_id: int
    sample: int
    """Index among the samples of its prompt, from 0."""
    level: str
    num_tokens: int
    finish_reason: FinishReason
    outcome: VerifierOutcome
    """`timeout` and `error`: the verifier gave no verdict, so `reward` is None."""
    reward: float | None
    passed: bool
    """Whether it is correct; False without a verdict."""
    extracted: str | None
    """The answer as the verifier extracted it; None when there is none."""
    answer: str
    """The ground truth."""
    text: str
    error: str = ""
    """Why the verifier gave no verdict."""

    @property
    def key(self) -> tuple[int, int]:
        return self.prompt_id, self.sample

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason == "length"

    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


_FIELDS = frozenset(field.name for field in fields(SampleRecord))


class SampleFile:
    """Appends records; a context manager that holds an exclusive lock on the file.

    `records` are those of earlier processes. A last line without its end, left by a process that
    was killed while it wrote, is removed.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`settings`: everything the samples depend on, as plain JSON values."""
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self._clock = clock
        self._synced_s = clock()
        self.records: list[SampleRecord] = []

    def __enter__(self) -> Self:
        """Raises SpeedAsyncError when the file has other settings or is in use, DataError when it
        has a damaged line, OSError when it cannot be written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._check_settings()
            whole = _whole_lines(self.path)
            os.ftruncate(self._descriptor, len(whole))
            self.records = parse_records(self.path, whole)
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._descriptor)
        os.close(self._descriptor)

    def append(self, record: SampleRecord) -> None:
        """Raises OSError; a part of the line may then be in the file, and is removed on resume."""
        left = memoryview(record.line().encode(errors="backslashreplace"))
        while left:
            left = left[os.write(self._descriptor, left) :]
        if self._clock() - self._synced_s >= SYNC_INTERVAL_S:
            os.fsync(self._descriptor)
            self._synced_s = self._clock()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpeedAsyncError(
                f"'{self.path}' is being written by another evaluation: wait for it, or set "
                "another folder with --out"
            ) from None

    def _check_settings(self) -> None:
        path = settings_path(self.path)
        if not path.is_file():
            if os.fstat(self._descriptor).st_size:
                raise SpeedAsyncError(
                    f"'{self.path}' has samples but '{path.name}' is missing, so their settings "
                    "are not known: remove it, or set another folder with --out"
                )
            write_atomically(path, json.dumps(self._settings, indent=2) + "\n")
            flush(self.path.parent)
            return
        started = read_settings(path)
        changes = [
            f"{name} was {_shown(started.get(name))} and is {_shown(self._settings.get(name))}"
            for name in sorted({*started, *self._settings})
            if started.get(name) != self._settings.get(name)
        ]
        if changes:
            raise SpeedAsyncError(
                f"'{self.path}' was started with other settings ({'; '.join(changes)}): use the "
                "same settings to continue it, or set another folder with --out"
            )


def samples_path(folder: Path, suite: str) -> Path:
    return folder / f"{suite}.jsonl"


def settings_path(samples: Path) -> Path:
    return samples.with_suffix(".settings.json")


def read_settings(path: Path) -> dict[str, Any]:
    """Raises DataError."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"settings file '{path}' cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise DataError(f"settings file '{path}' is not a JSON object")
    return settings


def read_records(path: Path) -> list[SampleRecord]:
    """The samples of a file, without an unfinished last line. Raises DataError."""
    try:
        return parse_records(path, _whole_lines(path))
    except OSError as error:
        raise DataError(f"samples '{path}' cannot be read: {error.strerror}") from None


def parse_records(path: Path, content: bytes) -> list[SampleRecord]:
    """One record per (prompt, sample), in file order. Raises DataError."""
    records: dict[tuple[int, int], SampleRecord] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            values = json.loads(line)
            record = SampleRecord(**{name: values[name] for name in _FIELDS & values.keys()})
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"samples '{path}', line {number}: not a sample ({error}); remove the line, and "
                "its sample is generated again"
            ) from None
        records.setdefault(record.key, record)
    return list(records.values())


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."
