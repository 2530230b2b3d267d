"""All checkpoints of a run in one folder: which is the newest whole one, and how many are kept.

Torch-free, so that a run can say where it goes on from before anything heavy is imported. Names
that begin with a dot are on their way in or out, and no checkpoints:

.NAME.partial    being written; worth nothing
.NAME.replaced   a checkpoint, set aside for one of the same name; it comes back if that never came
.NAME.removed    one too many, being deleted
"""

import contextlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from speed_async.config.whole_file import flush
from speed_async.errors import ModelError
from speed_async.learner.checkpoint.checksums import damage

TRAINING_FOLDER = "training"
"""In a checkpoint: all that is not the model. Format 2 kept it beside the model."""
TRAINER_FILE = "trainer.json"
_NAME = re.compile(r"version-(\d{6,})")
_LEFTOVER = re.compile(r"\.(version-\d{6,})\.(partial|replaced|removed)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The checkpoint to go on from, and what a person should know about those passed over."""

    folder: Path | None
    """None: the run's first model, since the only checkpoints are damaged."""
    policy_version: int
    notices: tuple[str, ...]


def checkpoint_folder(root: Path, policy_version: int) -> Path:
    return root / f"version-{policy_version:06d}"


def kept_versions(root: Path) -> list[int]:
    """Versions under their final names, oldest first; whether they are whole is not looked at."""
    names = (path.name for path in root.iterdir()) if root.is_dir() else ()
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def run_ids(root: Path) -> dict[str, str]:
    """By checkpoint, oldest first, the run that made it; one that does not say is left out."""
    found = {}
    for version in kept_versions(root):
        folder = checkpoint_folder(root, version)
        training = folder / TRAINING_FOLDER
        path = (training if training.is_dir() else folder) / TRAINER_FILE
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if run_id := str(json.loads(path.read_text())["run_id"]):
                found[folder.name] = run_id
    return found


def tidy(root: Path) -> None:
    """Undo what a process that was killed left half done. Raises OSError."""
    for path in sorted(root.glob(".*")):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        final = root / match[1]
        if match[2] == "replaced" and not final.exists():
            path.rename(final)
        else:
            shutil.rmtree(path)


def put(partial: Path, folder: Path) -> None:
    """Give a whole checkpoint its final name, in place of one of the same name. Raises OSError."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(root: Path, keep_last: int) -> int:
    """Remove all but the newest `keep_last`; returns the oldest version that may be gone on from.

    That is 0, the first model, until there are `keep_last`: each of them must have something to
    fall back to. One that cannot be removed now is removed another time.
    """
    for version in kept_versions(root)[:-keep_last]:
        folder = checkpoint_folder(root, version)
        removed = folder.with_name(f".{folder.name}.removed")
        try:
            folder.rename(removed)
        except OSError:
            continue
        shutil.rmtree(removed, ignore_errors=True)
    kept = kept_versions(root)
    return kept[0] if len(kept) >= keep_last else 0


def latest_valid(root: Path, keep_last: int) -> Found | None:
    """The newest checkpoint of which every byte is as it was written; None when there is none.

    Damaged ones that are newer are set aside under another name (NAME.damaged), and named in the
    notices. When all are damaged, the first model is what is found, as long as there are fewer than
    `keep_last`: until then the journal keeps the batches from the start. Raises ModelError when
    there were as many.
    """
    if not root.is_dir():
        return None
    try:
        tidy(root)
    except OSError as error:
        raise ModelError(f"checkpoints in '{root}' cannot be put in order: {error}") from error
    damaged: list[tuple[Path, str]] = []
    for version in reversed(kept_versions(root)):
        folder = checkpoint_folder(root, version)
        what = damage(folder)
        if not what:
            notices = [_set_aside(bad, why, instead=folder.name) for bad, why in damaged]
            return Found(folder=folder, policy_version=version, notices=tuple(notices))
        damaged.append((folder, what))
    if len(damaged) >= keep_last:
        each = "; ".join(f"{folder.name}: {what}" for folder, what in damaged)
        raise ModelError(
            f"every checkpoint in '{root}' is damaged ({each}), and the journal does not go back "
            "to the start: bring one back from a copy, or start a new run (a larger "
            "learner.keep_last keeps more to fall back to)"
        )
    if damaged:
        start = "the start (version 0, the first model)"
        notices = [_set_aside(bad, why, instead=start) for bad, why in damaged]
        return Found(folder=None, policy_version=0, notices=tuple(notices))
    return None


def _set_aside(folder: Path, what: str, *, instead: str) -> str:
    """Out of the way of the checkpoints to come; returns what to say about it."""
    aside = folder.with_name(f"{folder.name}.damaged")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    except OSError as error:
        raise ModelError(f"damaged checkpoint '{folder}' cannot be set aside: {error}") from error
    return (
        f"checkpoint {folder.name} is damaged ({what}); going on from {instead}, "
        f"the damaged one is kept as {aside.name}"
    )
