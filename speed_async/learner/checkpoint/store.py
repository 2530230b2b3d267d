"""The checkpoints of a run in one folder: finds the newest valid one and prunes old ones.

This module does not import torch, so that a run can report its checkpoint before heavy imports.
Names that begin with a dot are intermediate states, not checkpoints:

.NAME.partial    being written; deleted on recovery
.NAME.replaced   being replaced by a checkpoint of the same name; restored if that one is missing
.NAME.removed    being deleted
"""

import contextlib
import json
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from speed_async.config.whole_file import flush
from speed_async.errors import ModelError
from speed_async.learner.checkpoint.checksums import damage

TRAINING_FOLDER = "training"
"""Folder of the training state in a checkpoint. Format 2 has these files next to the model."""
TRAINER_FILE = "trainer.json"
_NAME = re.compile(r"version-(\d{6,})")
_LEFTOVER = re.compile(r"\.(version-\d{6,})\.(partial|replaced|removed)")


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundCheckpoint:
    """The checkpoint from which to resume, and notices about damaged ones that were skipped."""

    folder: Path | None
    """None means the initial model: all checkpoints are damaged."""
    policy_version: int
    notices: tuple[str, ...]


def checkpoint_folder(root: Path, policy_version: int) -> Path:
    return root / f"version-{policy_version:06d}"


def kept_versions(root: Path) -> list[int]:
    """Versions with a final name, oldest first. Their checksums are not verified."""
    names = (path.name for path in root.iterdir()) if root.is_dir() else ()
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def run_ids(root: Path) -> dict[str, str]:
    """Maps each checkpoint, oldest first, to the id of its run. Checkpoints without an id are
    omitted."""
    found = {}
    for version in kept_versions(root):
        folder = checkpoint_folder(root, version)
        training = folder / TRAINING_FOLDER
        path = (training if training.is_dir() else folder) / TRAINER_FILE
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if run_id := str(json.loads(path.read_text())["run_id"]):
                found[folder.name] = run_id
    return found


def clean_up(root: Path) -> None:
    """Completes or reverts operations that a killed process left unfinished. Raises OSError."""
    for path in sorted(root.glob(".*")):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        final = root / match[1]
        if match[2] == "replaced" and not final.exists():
            path.rename(final)
        else:
            shutil.rmtree(path)


def commit(partial: Path, folder: Path) -> None:
    """Renames a complete checkpoint to its final name and replaces one of the same name.

    Raises OSError.
    """
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(root: Path, keep_last: int, kept: Collection[int] = ()) -> int:
    """Removes all but the newest `keep_last` checkpoints and those of the versions in `kept`.
    Returns the oldest version from which the run can resume; older ones are kept for their weights.

    This is 0, the initial model, until there are `keep_last` checkpoints. A checkpoint that cannot
    be removed is removed by a later call.
    """
    for version in kept_versions(root)[:-keep_last]:
        if version in kept:
            continue
        folder = checkpoint_folder(root, version)
        removed = folder.with_name(f".{folder.name}.removed")
        try:
            folder.rename(removed)
        except OSError:
            continue
        shutil.rmtree(removed, ignore_errors=True)
    left = kept_versions(root)
    return left[-keep_last] if len(left) >= keep_last else 0


def latest_valid(root: Path, keep_last: int) -> FoundCheckpoint | None:
    """The newest checkpoint with valid checksums; None when there is no checkpoint.

    Newer damaged checkpoints are renamed to NAME.damaged and listed in the notices. When all are
    damaged and there are fewer than `keep_last`, the result is the initial model: the journal still
    has all batches from the start. Raises ModelError when all are damaged and there are `keep_last`
    or more.
    """
    if not root.is_dir():
        return None
    try:
        clean_up(root)
    except OSError as error:
        raise ModelError(f"checkpoints in '{root}' cannot be cleaned up: {error}") from error
    damaged: list[tuple[Path, str]] = []
    for version in reversed(kept_versions(root)):
        folder = checkpoint_folder(root, version)
        what = damage(folder)
        if not what:
            notices = [
                _quarantine(damaged_folder, reason, instead=folder.name)
                for damaged_folder, reason in damaged
            ]
            return FoundCheckpoint(folder=folder, policy_version=version, notices=tuple(notices))
        damaged.append((folder, what))
    if len(damaged) >= keep_last:
        each = "; ".join(f"{folder.name}: {what}" for folder, what in damaged)
        raise ModelError(
            f"every checkpoint in '{root}' is damaged ({each}), and the journal does not go back "
            "to the start: restore one from a backup, or start a new run (a larger "
            "learner.keep_last keeps more checkpoints)"
        )
    if damaged:
        start = "the start (version 0, the initial model)"
        notices = [
            _quarantine(damaged_folder, reason, instead=start) for damaged_folder, reason in damaged
        ]
        return FoundCheckpoint(folder=None, policy_version=0, notices=tuple(notices))
    return None


def _quarantine(folder: Path, what: str, *, instead: str) -> str:
    """Renames a damaged checkpoint to NAME.damaged. Returns the notice for it."""
    renamed = folder.with_name(f"{folder.name}.damaged")
    try:
        shutil.rmtree(renamed, ignore_errors=True)
        folder.rename(renamed)
    except OSError as error:
        raise ModelError(f"damaged checkpoint '{folder}' cannot be renamed: {error}") from error
    return (
        f"checkpoint {folder.name} is damaged ({what}); resuming from {instead}, "
        f"the damaged one is kept as {renamed.name}"
    )
