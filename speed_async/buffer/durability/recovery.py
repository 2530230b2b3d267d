"""From a run's journal to the machine as it was when it died.

Takes the newest segment whose beginning is whole, fills a machine with its snapshot, and takes in
once more what came after. Bytes that fail their checksum are damage: they are cut off and told,
never guessed. What is whole and does not fit is refused, and stays on disk as it is.
"""

import json
from collections.abc import Callable
from pathlib import Path

from speed_async.buffer.durability.journal import Journal, cut, read_segment, segments
from speed_async.buffer.durability.opened import UNTOUCHED, check_format, check_opened, opened_text
from speed_async.buffer.durability.snapshot import capture, restore
from speed_async.buffer.service import BufferService
from speed_async.buffer.state_machine import StateMachine
from speed_async.config.load import parse_config
from speed_async.config.schema import Config
from speed_async.errors import JournalRefused, SpeedAsyncError

Build = Callable[[Config], BufferService]


def open_machine(
    folder: Path | None, config: Config, build: Build, *, life: int
) -> tuple[StateMachine, list[str]]:
    """The machine with its journal open, and what a person should know of how it came about.

    `folder` None keeps no journal. A higher `life` than the journal's begins another one.
    Raises JournalRefused when the journal is whole and does not fit, OSError when it cannot be
    written.
    """
    if folder is None:
        machine, notes = StateMachine(build(config)), []
    else:
        machine, notes = _recovered(folder, config, build)
        last = max(segments(folder), default=0)
        machine.journal = begin_segment(folder, machine, last + 1)
        machine.journal.sync()
    if life > machine.service.attempt:
        machine.begin_attempt(life, machine.last_s)
    return machine, notes


def begin_segment(folder: Path, machine: StateMachine, number: int) -> Journal:
    """A new segment that holds the machine's present state; to be synced. Raises OSError."""
    sequence = machine.service.sequence
    if machine.journal is not None:
        sequence = machine.journal.sequence
    journal = Journal.begin(folder, number, sequence)
    try:
        service = machine.service
        facts = opened_text(
            sequence=sequence, data=service.fingerprint, model=service.model_fingerprint
        )
        settings = service.config.model_dump_json().encode()
        journal.append("opened", machine.last_s, text=facts, frames=[settings])
        journal.append("snapshot", machine.last_s, frames=[capture(machine)])
        journal.write()
    except OSError:
        journal.close()
        journal.remove()
        raise
    return journal


def _recovered(folder: Path, config: Config, build: Build) -> tuple[StateMachine, list[str]]:
    notes: list[str] = []
    for number in reversed(segments(folder)):
        try:
            found = _read(folder, number, build)
            machine = None if found is None else _under(config, found[0], build)
        except JournalRefused:
            raise
        except Exception as error:  # of whatever release wrote this: never a reason to drop it
            raise _not_understood(folder, number, error) from error
        if found is None or machine is None:
            notes.append(f"journal segment {number} was damaged at its beginning and left out")
            continue
        if damaged := cut(folder, number, found[1]):
            notes.append(
                f"the journal's tail was damaged: {damaged} bytes after record "
                f"{machine.service.sequence} were cut off"
            )
        return machine, notes
    if notes:
        notes.append("the journal begins anew")
    return StateMachine(build(config)), notes


def _read(folder: Path, number: int, build: Build) -> tuple[StateMachine, int] | None:
    """The machine at the end of this segment's last whole record, and where that ends; None when
    the segment's beginning is damaged. Changes nothing on disk."""
    check_format(folder, number)
    records = read_segment(folder, number)
    place, first = next(records, (None, None))
    if place is None or first is None or first.kind != "opened":
        return None
    # Its paths may lead nowhere today: what counts then is the present configuration's.
    machine = StateMachine(build(parse_config(json.loads(bytes(first.frames[0])))))
    service = machine.service
    check_opened(folder, first, data=service.fingerprint, model=service.model_fingerprint)
    service.sequence = json.loads(first.text)["sequence"]
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
    return (machine, end) if whole else None


def _under(config: Config, machine: StateMachine, build: Build) -> StateMachine:
    """The same machine under the settings of today."""
    if machine.service.config != config:
        now = StateMachine(build(config))
        restore(now, capture(machine))
        machine = now
    machine.conversations.rewind_all()
    return machine


def _not_understood(folder: Path, number: int, error: Exception) -> JournalRefused:
    what = str(error) if isinstance(error, SpeedAsyncError) else f"{type(error).__name__}: {error}"
    return JournalRefused(
        f"segment {number} of the journal in '{folder}' is whole, and this release cannot go on "
        f"from it ({what}). {UNTOUCHED}: resume with the release that wrote it, or move the "
        "journal away and resume; the run then goes on from its last checkpoint, without the "
        "groups that were not trained yet"
    )
