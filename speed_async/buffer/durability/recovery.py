"""Recovery of the service's state machine from the journal after a crash.

Loads the snapshot of the newest segment whose beginning is intact, and replays the records after
it. Bytes that fail their checksum are damaged: they are cut off and reported, never interpreted. An
intact journal that does not match is refused, and stays on disk unchanged. The first record of a
segment tells the release, the data and the model that it was written with.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from speed_async.buffer.durability.journal import (
    Journal,
    Record,
    cut,
    format_of,
    read_segment,
    segments,
)
from speed_async.buffer.durability.snapshot import SNAPSHOT_VERSION, capture, restore
from speed_async.buffer.service import BufferService
from speed_async.buffer.state import MachineState, ServiceState
from speed_async.buffer.state_machine import StateMachine
from speed_async.config.load import parse_config
from speed_async.config.schema import Config
from speed_async.errors import JournalRefused, SpeedAsyncError
from speed_async.observability.metrics import Event
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


Build = Callable[[Config, ServiceState | None], BufferService]
"""Builds the service from its configuration and its state; None for that of a new run."""


def open_machine(
    folder: Path | None,
    config: Config,
    build: Build,
    *,
    data: str,
    model: str,
    attempt: int,
    replayed: Callable[[Sequence[Event]], object] = tuple,
) -> tuple[StateMachine, list[str]]:
    """Return the machine with its journal open, and human-readable notes about the recovery.

    `folder` None keeps no journal. `data` and `model` are the fingerprints of the service that
    `build` builds. A higher `attempt` than the journal's begins a new attempt. `replayed` is called
    with the events that the recovery emitted again.
    Raises JournalRefused when the journal is intact and does not match, OSError when it cannot be
    written.
    """
    if folder is None:
        machine, notes = StateMachine(build(config, None)), []
    else:
        machine, sequence, events, notes = _recovered(folder, config, build, data=data, model=model)
        replayed(events)
        last = max(segments(folder), default=0)
        machine.journal = begin_segment(folder, machine, last + 1, sequence)
        machine.journal.sync()
    if attempt > machine.state.service.attempt:
        machine.begin_attempt(attempt, machine.last_s)
    return machine, notes


def begin_segment(folder: Path, machine: StateMachine, number: int, sequence: int) -> Journal:
    """A new segment with the machine's current state, not yet synced. `sequence` is that of the
    last record before it. Raises OSError."""
    journal = Journal.begin(folder, number, sequence)
    try:
        service = machine.service
        text = opened_text(data=service.fingerprint, model=service.model_fingerprint)
        settings = service.config.model_dump_json().encode()
        journal.append("opened", machine.last_s, text=text, frames=[settings])
        journal.append("snapshot", machine.last_s, frames=[capture(machine.state)])
        journal.write()
    except OSError:
        journal.close()
        journal.remove()
        raise
    return journal


def _recovered(
    folder: Path, config: Config, build: Build, *, data: str, model: str
) -> tuple[StateMachine, int, list[Event], list[str]]:
    """The machine, the sequence number of its last record, the events that were emitted again, and
    notes about the recovery."""
    notes: list[str] = []
    for number in reversed(segments(folder)):
        try:
            found = _read(folder, number, build, data=data, model=model)
            machine = None if found is None else _restarted(config, found[0], build)
        except JournalRefused:
            raise
        except Exception as error:  # an error of any release: never a reason to drop the journal
            raise _unreadable(folder, number, error) from error
        if found is None or machine is None:
            notes.append(f"journal segment {number} is damaged at its beginning and was skipped")
            continue
        _, last, events = found
        if damaged := cut(folder, number, last.end):
            notes.append(
                f"the journal's tail was damaged: {damaged} bytes after record {last.sequence} "
                "were cut off"
            )
        return machine, last.sequence, events, notes
    if notes:
        notes.append("a new journal was started")
    return StateMachine(build(config, None)), 0, [], notes


def _read(
    folder: Path, number: int, build: Build, *, data: str, model: str
) -> tuple[StateMachine, Record, list[Event]] | None:
    """The machine after this segment's last complete record, that record, and the events that were
    emitted again. Returns None when the segment's beginning is damaged. Changes nothing on disk."""
    check_format(folder, number)
    records = read_segment(folder, number)
    place, first = next(records, (None, None))
    if place is None or first is None or first.kind != "opened":
        return None
    check_opened(folder, first, data=data, model=model)
    # Its recorded paths may no longer exist; the current configuration replaces them later.
    config = parse_config(json.loads(bytes(first.frames[0])))
    _, last = next(records, (None, None))
    if last is None or last.kind != "snapshot":
        return None
    state = restore(MachineState, last.frames[0])
    machine = StateMachine(build(config, state.service), state)
    events: list[Event] = []
    for place, record in records:
        events += machine.replay(place, record)
        last = record
    return machine, last, events


def _restarted(config: Config, machine: StateMachine, build: Build) -> StateMachine:
    """The same machine with the current configuration, before its peers are connected again."""
    if machine.service.config != config:
        machine = StateMachine(build(config, machine.state.service), machine.state)
    machine.sessions.rewind_all()
    machine.service.membership.restart_timeouts(machine.last_s)
    return machine


def _unreadable(folder: Path, number: int, error: Exception) -> JournalRefused:
    what = str(error) if isinstance(error, SpeedAsyncError) else f"{type(error).__name__}: {error}"
    return JournalRefused(
        f"segment {number} of the journal in '{folder}' is intact, but this release cannot recover "
        f"from it ({what}). {UNCHANGED}: resume with the release that wrote it, or move the "
        "journal away and resume; the run then continues from its last checkpoint, without the "
        "groups that were not trained yet"
    )
