"""The first record of a journal segment: the release, the data and the model that it was written
under. What does not fit the present ones is refused, and never taken for damage."""

import json
from pathlib import Path

from speed_async.buffer.durability.journal import Record, format_of, read_segment, segments
from speed_async.errors import JournalRefused
from speed_async.transport.messages import PROTOCOL_VERSION

UNTOUCHED = "Nothing in it was changed"


def opened_text(*, sequence: int, data: str, model: str) -> str:
    """The record's text. `data` and `model`: fingerprints."""
    facts = {"protocol": PROTOCOL_VERSION, "sequence": sequence, "data": data, "model": model}
    return json.dumps(facts)


def check_opened(folder: Path, record: Record, *, data: str, model: str) -> None:
    """Raises JournalRefused when the segment that this record opens does not fit."""
    facts = json.loads(record.text)
    if (version := facts.get("protocol")) != PROTOCOL_VERSION:
        raise _of_another_release(folder, f"protocol version {version}", str(PROTOCOL_VERSION))
    for name, present in (("data", data), ("model", model)):
        began = facts.get(name, present)  # absent where an earlier build of this protocol wrote it
        if began != present:
            raise JournalRefused(
                f"the journal in '{folder}' was written with another {name} (fingerprint {began}) "
                f"than there is now ({present}). {UNTOUCHED}: bring that {name} back, or start a "
                "new run"
            )


def check_format(folder: Path, segment: int) -> None:
    """Raises JournalRefused for a segment in the format of another release."""
    found, ours = format_of(folder, segment)
    if found != ours:
        raise _of_another_release(folder, f"format {found}", ours)


def check_segments(folder: Path, *, data: str, model: str) -> None:
    """Raises JournalRefused when the newest segment that has a beginning does not fit. Changes
    nothing, and reads no more than that beginning."""
    for number in reversed(segments(folder)):
        check_format(folder, number)
        _, first = next(read_segment(folder, number), (None, None))
        if first is not None and first.kind == "opened":
            check_opened(folder, first, data=data, model=model)
            return


def _of_another_release(folder: Path, found: str, ours: str) -> JournalRefused:
    return JournalRefused(
        f"the journal in '{folder}' was written by another release (it has {found}, this release "
        f"{ours}). {UNTOUCHED}: resume with the release that wrote it, or start a new run from a "
        "checkpoint"
    )
