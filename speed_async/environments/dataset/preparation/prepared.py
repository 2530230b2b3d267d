"""Prepared data sets on disk: their files, and the evaluation sets among them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from speed_async.environments.dataset.preparation.contamination import EvaluationSet
from speed_async.environments.dataset.preparation.inputs import sha256_of
from speed_async.environments.dataset.preparation.selection import NumberedRow
from speed_async.errors import DataError

CARD = "card.json"
CARD_TEXT = "card.md"
REJECTS = "rejects.jsonl"


def write_rows(path: Path, rows: Sequence[NumberedRow], name: str) -> None:
    """Write the columns prompt, answer, level, source and id; equal rows give equal bytes.

    `name` is the source of rows that state none. The id of a row is its own, made unique by the
    number of the row in the input, which is also the id of a row that has none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "prompt": [each.row.prompt for each in rows],
        "answer": [each.row.answer for each in rows],
        "level": [each.row.level for each in rows],
        "source": [each.row.source or name for each in rows],
        "id": _ids(rows),
    }
    fields = [pa.field(column, pa.string(), nullable=False) for column in columns]
    pq.write_table(pa.table(columns, schema=pa.schema(fields)), path)


def _ids(rows: Sequence[NumberedRow]) -> list[str]:
    taken: dict[str, None] = {}
    for each in rows:
        identifier = each.row.id or f"row-{each.number}"
        while identifier in taken:
            identifier += f"-row-{each.number}"
        taken[identifier] = None
    return list(taken)


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of a prepared data set; None when the folder has none that can be read."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        return card if isinstance(card, dict) and "fingerprint" in card else None
    except (OSError, ValueError):
        return None


def is_whole(folder: Path, card: dict[str, Any]) -> bool:
    """Whether the rows of a prepared data set are those that its card was written for."""
    rows = folder / card["output"]["file"]
    return rows.is_file() and sha256_of([rows]) == card["output"]["sha256"]


def evaluation_sets_beside(out: Path) -> list[EvaluationSet]:
    """The prepared evaluation sets in the folder that contains `out`, by name."""
    return [
        _read_evaluation_set(folder, card)
        for folder, card in _prepared_in(out.parent)
        if folder != out and card["role"] == "evaluation"
    ]


def find_evaluation_set(out: Path, name_or_folder: str) -> EvaluationSet:
    """A prepared evaluation set: by its folder, or by its name beside `out`. Raises DataError."""
    for folder in (Path(name_or_folder).expanduser(), out.parent / name_or_folder):
        card = read_card(folder)
        if card is not None and card["role"] == "evaluation":
            return _read_evaluation_set(folder, card)
    raise DataError(
        f"--decontaminate = {name_or_folder!r}: neither this folder nor "
        f"'{out.parent / name_or_folder}' is a prepared evaluation set: prepare it first"
    )


def _prepared_in(parent: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
        if folder.name.startswith("."):
            continue  # such as a staging folder
        card = read_card(folder)
        if card is not None:
            yield folder, card


def _read_evaluation_set(folder: Path, card: dict[str, Any]) -> EvaluationSet:
    """Raises DataError when its file is not the one that its card was written for."""
    import pyarrow.parquet as pq

    if not is_whole(folder, card):
        raise DataError(
            f"prepared data set '{folder}' was changed or is incomplete: prepare it again, or "
            "remove the folder"
        )
    table = pq.read_table(folder / card["output"]["file"], columns=["id", "prompt"])
    return EvaluationSet(
        name=card["name"],
        sha256=card["output"]["sha256"],
        ids=table["id"].to_pylist(),
        problems=table["prompt"].to_pylist(),
    )
