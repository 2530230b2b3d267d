"""Prompts of the `dataset` task, read from its memory-mapped rows one at a time."""

from collections.abc import Sequence
from typing import Any, overload

from speed_async.environments.dataset.rows import MappedPages, row_at
from speed_async.types import Int32Array, Prompt


class DatasetPrompts(Sequence[Prompt]):
    """Prompt i is row `rows_N[i]` of the table. A slice is such a sequence, and copies nothing."""

    def __init__(
        self,
        table: Any,
        pages: MappedPages,
        rows_N: Int32Array,
        *,
        held_out: bool,
        ids: range | None = None,
        digest: str | None = None,
    ) -> None:
        """`ids`: the prompts of a slice; None: all. `digest`: see StoredPrompts (task.py)."""
        self._table = table
        self._pages = pages
        self._rows_N = rows_N
        self._held_out = held_out
        self._ids = range(len(rows_N)) if ids is None else ids
        self.digest = digest

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> "DatasetPrompts": ...
    def __getitem__(self, index: int | slice) -> "Prompt | DatasetPrompts":
        chosen = self._ids[index]
        if isinstance(chosen, range):
            return DatasetPrompts(
                self._table, self._pages, self._rows_N, held_out=self._held_out, ids=chosen
            )
        row = row_at(self._table, self._pages, int(self._rows_N[chosen]))
        return Prompt(
            prompt_id=chosen,
            text=row.prompt,
            answer=row.answer,
            level=row.level,
            held_out=self._held_out,
            metadata=row.metadata,
        )
