"""From a run's journal to the machine as it was when it died.

Takes the newest segment whose beginning is whole, fills a machine with its snapshot, and takes in
once more what came after. What cannot be read is cut off and told, never guessed.
"""

import json
from collections.abc import Callable
from pathlib import Path

from speed_async.buffer.capture import capture, restore
from speed_async.buffer.journal import Journal, cut, read_segment, segments
from speed_async.buffer.machine import Machine
from speed_async.buffer.service import BufferService
from speed_async.config.load import build_config
from speed_async.config.schema import Config
from speed_async.errors import JournalError, SpeedAsyncError
from speed_async.wire.messages import PROTOCOL_VERSION

Build = Callable[[Config], BufferService]


def open_machine(
    folder: Path | None, config: Config, build: Build, *, life: int
) -> tuple[Machine, list[str]]:
    """The machine with its journal open, and what a person should know of how it came about.

    `folder` None keeps no journal. A higher `life` than the journal's begins another one.
    Raises JournalError when the journal is of another release, OSError when it cannot be written.
    """
    if folder is None:
        machine, notes = Machine(build(config)), []
    else:
        machine, notes = _recovered(folder, config, build)
        last = max(segments(folder), default=0)
        machine.journal = begin_segment(folder, machine, last + 1)
        machine.journal.sync()
    if life > machine.service.life:
        machine.begin_life(life, machine.last_s)
    return machine, notes


def begin_segment(folder: Path, machine: Machine, number: int) -> Journal:
    """A new segment that holds the machine's present state; to be synced. Raises OSError."""
    sequence = machine.service.sequence
    if machine.journal is not None:
        sequence = machine.journal.sequence
    journal = Journal.begin(folder, number, sequence)
    try:
        facts = json.dumps({"protocol": PROTOCOL_VERSION, "sequence": sequence})
        settings = machine.service.config.model_dump_json().encode()
        journal.append("opened", machine.last_s, text=facts, frames=[settings])
        journal.append("snapshot", machine.last_s, frames=[capture(machine)])
        journal.write()
    except OSError:
        journal.close()
        journal.remove()
        raise
    return journal


def _recovered(folder: Path, config: Config, build: Build) -> tuple[Machine, list[str]]:
    notes: list[str] = []
    for number in reversed(segments(folder)):
        try:
            machine = _read(folder, number, build, notes)
        except JournalError as error:
            notes.append(f"journal segment {number} is of no use: {error}")
            continue
        if machine is not None:
            return _under(config, machine, build), notes
        notes.append(f"journal segment {number} was damaged at its beginning and left out")
    if notes:
        notes.append("the journal begins anew")
    return Machine(build(config)), notes


def _read(folder: Path, number: int, build: Build, notes: list[str]) -> Machine | None:
    """The machine at the end of this segment; None when the segment's beginning is damaged."""
    records = read_segment(folder, number)
    place, first = next(records, (None, None))
    if place is None or first is None or first.kind != "opened":
        return None
    facts = json.loads(first.text)
    if facts.get("protocol") != PROTOCOL_VERSION:
        raise JournalError(
            f"it is of protocol version {facts.get('protocol')}, this release speaks "
            f"{PROTOCOL_VERSION}: resume with the release that wrote it"
        )
    machine = Machine(build(build_config(json.loads(bytes(first.frames[0])))))
    machine.service.sequence = facts["sequence"]
    end, whole = first.end, False
    for place, record in records:
        end = record.end
        if record.kind == "snapshot":
            restore(machine, record.frames[0])
            whole = True
        elif not whole:
            return None
        else:
            machine.replay(place, record)
    if not whole:
        return None
    if damaged := cut(folder, number, end):
        notes.append(
            f"the journal's tail was damaged: {damaged} bytes after record "
            f"{machine.service.sequence} were cut off"
        )
    return machine


def _under(config: Config, machine: Machine, build: Build) -> Machine:
    """The same machine under the settings of today."""
    then = machine.service.config
    if then == config:
        machine.conversations.rewind_all()
        return machine
    now = Machine(build(config))
    try:
        restore(now, capture(machine))
    except SpeedAsyncError as error:
        raise JournalError(f"the run cannot go on under other settings: {error}") from error
    now.conversations.rewind_all()
    return now
