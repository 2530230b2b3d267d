"""The first record of a journal segment: the release, data and model that it was written with. A
mismatch with the current ones is refused and never treated as damage."""

import json
from pathlib import Path

from speed_async.buffer.durability.journal import Record, format_of, read_segment, segments
from speed_async.buffer.durability.snapshot import SNAPSHOT_VERSION
from speed_async.errors import JournalRefused
from speed_async.transport.messages import PROTOCOL_VERSION

UNCHANGED = "Nothing in it was changed"


def opened_text(*, data: str, model: str) -> str:
    """Text of the record. `data` and `model` are fingerprints."""
    versions = {"protocol": PROTOCOL_VERSION, "snapshot": SNAPSHOT_VERSION}
    return json.dumps(versions | {"data": data, "model": model})


def check_opened(folder: Path, record: Record, *, data: str, model: str) -> None:
    """Raises JournalRefused when the segment that begins with this record does not match."""
    fields = json.loads(record.text)
    for name, current in (("protocol", PROTOCOL_VERSION), ("snapshot", SNAPSHOT_VERSION)):
        if (version := fields.get(name)) != current:
            raise _of_another_release(folder, f"{name} version {version}", str(current))
    for name, current in (("data", data), ("model", model)):
        if (recorded := fields.get(name)) != current:
            raise JournalRefused(
                f"the journal in '{folder}' was written with another {name} (fingerprint "
                f"{recorded}, now {current}). {UNCHANGED}: restore that {name}, or start a new run"
            )


def check_format(folder: Path, segment: int) -> None:
    """Raises JournalRefused for a segment in the format of another release."""
    found, expected = format_of(folder, segment)
    if found != expected:
        raise _of_another_release(folder, f"format {found}", expected)


def check_segments(folder: Path, *, data: str, model: str) -> None:
    """Raises JournalRefused when the newest segment with a readable first record does not match.
    Changes nothing, and reads only first records."""
    for number in reversed(segments(folder)):
        check_format(folder, number)
        _, first = next(read_segment(folder, number), (None, None))
        if first is not None and first.kind == "opened":
            check_opened(folder, first, data=data, model=model)
            return


def _of_another_release(folder: Path, found: str, expected: str) -> JournalRefused:
    return JournalRefused(
        f"the journal in '{folder}' was written by another release (it has {found}, this release "
        f"{expected}). {UNCHANGED}: resume with the release that wrote it, or start a new run from "
        "a checkpoint"
    )
