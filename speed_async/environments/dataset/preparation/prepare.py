"""Prepares a published data set: the function behind `speed-async data prepare`."""

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from speed_async.config.whole_file import write_atomically
from speed_async.environments.dataset.preparation.card import (
    Card,
    Preparation,
    Step,
    card_text,
    make_card,
)
from speed_async.environments.dataset.preparation.contamination import EvaluationSet
from speed_async.environments.dataset.preparation.inputs import Input, open_input, sha256_of
from speed_async.environments.dataset.preparation.prepared import (
    CARD,
    CARD_TEXT,
    REJECTS,
    evaluation_sets_beside,
    find_evaluation_set,
    is_whole,
    read_card,
    write_rows,
)
from speed_async.environments.dataset.preparation.progress import track
from speed_async.environments.dataset.preparation.rejects import Rejects, counts
from speed_async.environments.dataset.preparation.selection import select_rows
from speed_async.environments.dataset.preparation.sources import Source, find_source
from speed_async.environments.dataset.preparation.staging import staged_folder
from speed_async.environments.dataset.preparation.steps import (
    part_of,
    without_contamination,
    without_near_duplicates,
)
from speed_async.errors import DataError

RULES_VERSION = 1
"""Raised with every change of the rules: what older ones prepared is then prepared again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """The result: the folder, its card, and whether it was up to date already."""

    folder: Path
    card: Card
    up_to_date: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    source: Source
    input: Input
    sets: Sequence[EvaluationSet]
    removed: Sequence[str]
    """The names of the sets whose problems are removed."""
    command: str
    fingerprint: str


def prepare(
    name: str, *, path: Path | None, out: Path | None, decontaminate: Sequence[str] = ()
) -> Prepared:
    """Write the prepared data set `name` to the folder `out`, by default `data/NAME`.

    `path` is a file or folder of the publisher; None loads the data set from the hub. The overlap
    with the evaluation sets beside `out` is reported; that with the sets in `decontaminate`, each a
    folder or a name beside `out`, is removed. A folder that equals the result is left as it is.
    Raises DataError.
    """
    source = find_source(name)
    if decontaminate and source.role == "evaluation":
        raise DataError(
            f"--decontaminate = {list(decontaminate)}: '{name}' is an evaluation set: omit it"
        )
    folder = (out or Path("data") / name).expanduser().resolve()
    _check_replaceable(folder)
    path = path.expanduser() if path is not None else None
    sets, removed = _evaluation_sets(source, folder, decontaminate)
    given = open_input(source, path)
    job = _Job(
        source=source,
        input=given,
        sets=sets,
        removed=removed,
        command=_command(name, path, out, decontaminate),
        fingerprint=_fingerprint(source, given, sets, removed),
    )
    card = read_card(folder)
    if card is not None and card["fingerprint"] == job.fingerprint and is_whole(folder, card):
        return Prepared(folder=folder, card=card, up_to_date=True)
    try:
        with staged_folder(folder) as staging:
            card = _write(job, staging)
    except OSError as error:
        raise DataError(
            f"--out '{folder}' cannot be written ({error.strerror}): choose another folder or make "
            "space"
        ) from error
    return Prepared(folder=folder, card=card, up_to_date=False)


def _write(job: _Job, folder: Path) -> Card:
    """Write all files of the prepared data set. Raises OSError."""
    source, given = job.source, job.input
    with Rejects(folder / REJECTS) as rejects:
        raw_rows = track(given.rows(), "reading rows", given.num_rows)
        selection = select_rows(raw_rows, given.columns, source, rejects)
        rows = selection.rows
        num_distinct = selection.num_read - selection.num_exact_duplicates
        steps = [
            Step(name="rows read", num_rows=selection.num_read),
            Step(name="exact duplicates dropped", num_rows=num_distinct),
            Step(name="unusable rows dropped", num_rows=len(rows)),
        ]
        rows = part_of(rows, source)
        if source.part != "all":
            name = "other part held out" if source.part == "rest" else "held-out part kept"
            steps.append(Step(name=name, num_rows=len(rows)))
        rows, near = without_near_duplicates(rows, source, rejects)
        if near.dropped:
            steps.append(Step(name="near duplicates dropped", num_rows=len(rows)))
        rows, contamination = without_contamination(rows, job.sets, job.removed, rejects)
        if job.removed:
            steps.append(Step(name="overlap with evaluation sets removed", num_rows=len(rows)))
    if not rows:
        listed = "; ".join(f"{count}: {reason}" for reason, count in rejects.by_reason.items())
        raise DataError(
            f"data set '{source.name}': no row of {given.description} can be used ({listed}): "
            "pass the published file, or another NAME"
        )
    write_rows(folder / source.file_name, rows, source.name)
    done = Preparation(
        source=source,
        input=given,
        command=job.command,
        fingerprint=job.fingerprint,
        steps=steps,
        rejects=counts(rejects.by_reason),
        num_instructions_removed=selection.num_instructions_removed,
        near_duplicates=near,
        contamination=contamination,
        rows=rows,
        output_sha256=sha256_of([folder / source.file_name]),
    )
    card = make_card(done)
    write_atomically(folder / CARD, json.dumps(card, indent=2) + "\n")
    write_atomically(folder / CARD_TEXT, card_text(card))
    return card


def _evaluation_sets(
    source: Source, folder: Path, decontaminate: Sequence[str]
) -> tuple[list[EvaluationSet], list[str]]:
    """The sets to compare with, by name, and the names of those to remove."""
    if source.role == "evaluation":
        return [], []
    given = [find_evaluation_set(folder, each) for each in decontaminate]
    beside = evaluation_sets_beside(folder)
    sets = {each.name: each for each in [*beside, *given]}
    return [sets[name] for name in sorted(sets)], sorted({each.name for each in given})


def _check_replaceable(folder: Path) -> None:
    """Raises DataError for a folder that holds anything but a prepared data set."""
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and read_card(folder) is None):
        raise DataError(
            f"--out '{folder}' exists and is not a prepared data set: remove it, or choose another"
        )


def _fingerprint(
    source: Source, given: Input, sets: Sequence[EvaluationSet], removed: Sequence[str]
) -> str:
    """Equal for equal inputs, options and rules."""
    parts = [
        str(RULES_VERSION),
        repr(source),
        given.sha256,
        given.description,
        repr([(each.name, each.sha256) for each in sets]),
        repr(removed),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _command(name: str, path: Path | None, out: Path | None, decontaminate: Sequence[str]) -> str:
    words = ["speed-async", "data", "prepare", name]
    words += ["--from", str(path)] if path is not None else []
    words += ["--out", str(out)] if out is not None else []
    for each in decontaminate:
        words += ["--decontaminate", each]
    return shlex.join(words)
