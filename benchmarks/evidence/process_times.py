"""CPU time of a run by role, read from /proc while it runs (Linux)."""

import os
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")
CHILD, LAUNCH = "speed_async.launcher.child", "speed_async.launch"


class ProcessTimes:
    """CPU seconds of a process and its descendants, by role.

    A process that has exited keeps the time of its last sample.
    """

    def __init__(self, root_id: int) -> None:
        self._root_id = root_id
        self._seconds: dict[int, float] = {}
        self._roles: dict[int, str] = {}
        self._commands: dict[int, list[str]] = {}

    def sample(self) -> float:
        """Reads all processes. Returns the total so far in CPU seconds."""
        stats = _stats()
        tree = {self._root_id}
        for process_id in sorted(stats, key=lambda each: stats[each][2]):  # parents start first
            if stats[process_id][0] in tree or process_id in self._seconds:
                tree.add(process_id)
        for process_id in tree & stats.keys():
            parent_id, seconds, _ = stats[process_id]
            self._seconds[process_id] = seconds
            self._assign(process_id, parent_id)
        return sum(self._seconds.values())

    def _assign(self, process_id: int, parent_id: int) -> None:
        """Assigns a role by the command; once for each command, which is empty after the exit. A
        new process has the command of its parent until it executes its own."""
        command = _command(process_id)
        if command and command != self._commands.get(process_id):
            self._commands[process_id] = command
            is_fork = command == self._commands.get(parent_id)
            self._roles[process_id] = _role(process_id, command, is_fork=is_fork)

    def by_role(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for process_id, seconds in self._seconds.items():
            role = self._roles.get(process_id, "launcher")
            totals[role] = totals.get(role, 0.0) + seconds
        return totals


def machine_busy_s() -> float:
    """CPU seconds that all processes of this machine have used since it started."""
    user, nice, system, _, _, irq, softirq = (PROC / "stat").read_text().split()[1:8]
    return TICK_S * sum(map(int, (user, nice, system, irq, softirq)))


def _stats() -> dict[int, tuple[int, float, int]]:
    """By process id: parent id, CPU seconds, start time in ticks."""
    found = {}
    for entry in os.scandir(PROC):
        if not entry.name.isdigit():
            continue
        try:
            fields = (PROC / entry.name / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has exited
            continue
        seconds = TICK_S * (int(fields[11]) + int(fields[12]))
        found[int(entry.name)] = (int(fields[1]), seconds, int(fields[19]))
    return found


def _role(process_id: int, command: list[str], *, is_fork: bool) -> str:
    if CHILD in command:
        role = command[command.index(CHILD) + 1]
        return "engine" if role == "actor" and is_fork else role
    if LAUNCH in command:
        return "learner" if _is_first_rank(process_id) else "supervisor"
    return "verifier" if "--multiprocessing-fork" in command else "launcher"


def _is_first_rank(process_id: int) -> bool:
    try:
        return b"RANK=0" in (PROC / str(process_id) / "environ").read_bytes().split(b"\0")
    except OSError:  # it has exited
        return False


def _command(process_id: int) -> list[str]:
    """Empty if it has exited."""
    try:
        return (PROC / str(process_id) / "cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []
