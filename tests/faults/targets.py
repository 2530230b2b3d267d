"""The processes of a run by role, read from /proc on each call."""

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.run_process import parent_of

CHILD = "speed_async.launcher.child "
RANK = "speed_async.launch "
MARK = "CHAOS_DRILL"


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Actors, engines and supervisors are named with the index of their rank: `actor-1`."""

    mark: str
    """Value of MARK in the environment of every process of this run, and only of those."""

    def all(self) -> dict[str, int]:
        """Process id by name. A process that has not been started yet is missing."""
        found: dict[str, int] = {}
        commands = self.commands()
        for process_id, command in commands.items():
            with suppress(OSError, ValueError, LookupError):  # it may be terminating
                if name := _name(process_id, command, commands):
                    found[name] = process_id
        return found

    def commands(self) -> dict[int, str]:
        """Command lines of all live processes of this run by process id, including those of
        verifier workers. A zombie has none."""
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                process_id = int(entry.name)
                with suppress(OSError):
                    if environment_of(process_id).get(MARK) == self.mark:
                        command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                        if command:
                            found[process_id] = command
        return found

    def kill_all(self) -> None:
        """Send SIGKILL to all processes, repeatedly: one may start another meanwhile."""
        for _ in range(50):
            left = self.commands()
            if not left:
                return
            for process_id in left:
                with suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)
            time.sleep(0.02)


def _name(process_id: int, command: str, commands: dict[int, str]) -> str | None:
    arguments = command.split()
    if RANK in command:
        rank = int(environment_of(process_id)["RANK"])
        return "learner" if rank == 0 else f"supervisor-{rank}"
    if CHILD not in command:
        return None
    role = command.partition(CHILD)[2].split()[0]
    if role != "actor":
        return role
    index = arguments[arguments.index("--index") + 1]
    is_engine = CHILD + "actor" in commands.get(parent_of(process_id), "")
    return f"{'engine' if is_engine else 'actor'}-{index}"


def environment_of(process_id: int) -> dict[str, str]:
    entries = Path(f"/proc/{process_id}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def private_bytes(process_id: int) -> int:
    """Resident memory without the pages of files: how many of these a new process has mapped
    differs by tens of megabytes from start to start."""
    _, resident, shared, *_ = Path(f"/proc/{process_id}/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
