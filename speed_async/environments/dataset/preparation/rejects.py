"""The file of rows that a prepared data set leaves out, each with its reason."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

MAX_VALUE_CHARS = 4000


class Rejects:
    """Writes one JSON line a row, and counts rows by reason."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._file = path.open("w", encoding="utf-8")
        self.by_reason: Counter[str] = Counter()

    def add(
        self,
        number: int,
        reason: str,
        *,
        detail: str = "",
        prompt: object = "",
        answer: object = "",
    ) -> None:
        """`number` is the row of the input, from 1; `reason` has no parts that vary by row."""
        self.by_reason[reason] += 1
        line = {"row": number, "reason": reason, "detail": detail}
        line |= {"prompt": _excerpt(prompt), "answer": _excerpt(answer)}
        self._file.write(json.dumps(line) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def counts(by_reason: Mapping[str, int]) -> dict[str, int]:
    """Most frequent first, equally frequent ones by name."""
    return dict(sorted(by_reason.items(), key=lambda item: (-item[1], item[0])))


def _excerpt(value: object) -> str:
    text = value if isinstance(value, str) else "" if value is None else repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS] + "..."
