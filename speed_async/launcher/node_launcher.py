"""`speed-async train`: starts, monitors and restarts the ranks of one node.

consumes   exits of the ranks, stop signals (forwarded to the ranks), the rendezvous record
restarts   all ranks of this node, up to cluster.max_restarts, when one failed; never a run that
           completed, was stopped, or was lost
ends       within cluster.drain_timeout_s + STOP_GRACE_S of a stop signal; prints one final line

It opens no socket. Ranks drain by themselves if it dies (speed_async/launch.py).
"""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from speed_async.config.schema import Config
from speed_async.errors import SpeedAsyncError
from speed_async.launcher.event_loop import stop_signals
from speed_async.launcher.exit_status import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NOTHING_LEARNED,
    EXIT_RUN_LOST,
    EXIT_STATUS,
    remote_end_line,
    resume_hint,
)
from speed_async.launcher.processes import ENVIRONMENT
from speed_async.launcher.rank import Node, check_world
from speed_async.launcher.rendezvous import FOLDER_VARIABLE, RendezvousFile, RendezvousRecord
from speed_async.launcher.standard_streams import STDERR, write_stream

PROCESS_VARIABLE = "SPEED_ASYNC_LAUNCHER"
"""Environment variable with the launcher's process id, set for its ranks."""
STOP_GRACE_S = 60.0
"""In addition to the drain: time to finish the current update and write a checkpoint."""
END_GRACE_S = 15.0
"""When the run has ended, the actors' ranks have this long to receive the end event and exit."""
RECORD_POLL_S = 0.5
FORCE_AFTER_S = 1.0
"""A second Ctrl-C at least this long after the first one ends the run within FORCE_GRACE_S."""
FORCE_GRACE_S = 3.0
ORDERLY_STATUSES = (0, EXIT_NOTHING_LEARNED, EXIT_INTERRUPTED)
"""Exit statuses of a learner whose run ended without a failure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _End:
    """How the ranks of this node ended."""

    status: int
    text: str = ""
    """On failure, the error of the rank that failed first."""


def launch_node(config: Config, arguments: Sequence[str], node: Node) -> int:
    """Run this node's ranks and return the exit status of the run. Raises ConfigError."""
    check_world(config, node.rank(0))
    try:
        folder = Path(tempfile.mkdtemp(prefix="speed_async-"))
    except OSError as error:
        raise SpeedAsyncError(
            f"cannot create a temporary folder ({error}): set TMPDIR to a writable folder"
        ) from None
    try:
        # Not uvloop: its child processes would not inherit the ignored SIGHUP of nohup.
        return asyncio.run(_Launcher(config, arguments, node, RendezvousFile(folder)).run())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(kw_only=True)
class _Ranks:
    """The rank processes of one attempt."""

    processes: dict[int, Process] = field(default_factory=dict)
    """By local rank."""
    ends: dict[int, int] = field(default_factory=dict)
    """Exit statuses by local rank, in the order of the exits."""

    def signal(self, which: signal.Signals) -> None:
        for local, process in self.processes.items():
            if local not in self.ends and process.returncode is None:
                process.send_signal(which)


class _Launcher:
    def __init__(
        self, config: Config, arguments: Sequence[str], node: Node, rendezvous: RendezvousFile
    ) -> None:
        self._config = config
        self._arguments = arguments
        self._node = node
        self._rendezvous = rendezvous
        self._last_record = RendezvousRecord()
        """The last record read; the file may be deleted by a temp cleaner during a long run."""
        self._ranks = _Ranks()
        self._stopped_by: signal.Signals | None = None
        self._stopped_s = 0.0
        self._forced = False
        """A second Ctrl-C ended the ranks without a drain; their errors say nothing more."""
        self._changed = asyncio.Event()
        """Set when a rank has exited or a stop signal has arrived."""

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for stop_signal in stop_signals():
            loop.add_signal_handler(stop_signal, self._stop, stop_signal)
        polling = asyncio.create_task(self._poll_record(), name="rendezvous")
        restarts = 0
        try:
            while True:
                end = await self._run_ranks(str(restarts))
                failed = end.status == EXIT_FAILED
                if not failed or self._stopped_by or restarts == self._config.cluster.max_restarts:
                    break
                restarts += 1
                write_stream(f"{end.text}; restarting all ranks (restart {restarts})\n", STDERR)
                # Keep the run folder and drop the address: the old service is gone.
                folder = self._read_record().run_folder
                self._rendezvous = RendezvousFile(self._rendezvous.path.parent)
                self._rendezvous.write(RendezvousRecord(run_folder=folder))
        finally:
            polling.cancel()
        return self._report_end(end)

    # --- one attempt -----------------------------------------------------------------------------

    async def _run_ranks(self, attempt: str) -> _End:
        self._ranks = ranks = _Ranks()
        waiting: list[asyncio.Task[None]] = []
        for local in range(self._node.num_ranks):
            process = await self._start(local, attempt)
            ranks.processes[local] = process
            waiting.append(asyncio.create_task(self._await_exit(ranks, local, process)))
        if self._stopped_by:  # the signal arrived while ranks were being started
            ranks.signal(self._stopped_by)
        while not self._must_end(ranks) and len(ranks.ends) < len(waiting):
            await self._changed.wait()
            self._changed.clear()
        killed = await self._end_others(ranks, waiting)
        return self._resolve_end(ranks, attempt, killed=killed)

    async def _start(self, local: int, attempt: str) -> Process:
        rank = self._node.rank(local)
        own = {
            "RANK": str(rank.rank),
            "WORLD_SIZE": str(rank.world_size),
            "LOCAL_RANK": str(rank.local_rank),
            "LOCAL_WORLD_SIZE": str(rank.local_world_size),
            "TORCHELASTIC_ERROR_FILE": str(self._error_file(local, attempt)),
            FOLDER_VARIABLE: str(self._rendezvous.path.parent),
            PROCESS_VARIABLE: str(os.getpid()),
        }
        # In its own session a rank does not receive the terminal's Ctrl-C; it is forwarded.
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "speed_async.launch",
            *self._arguments,
            env=ENVIRONMENT | dict(os.environ) | own,
            start_new_session=True,
        )

    async def _await_exit(self, ranks: _Ranks, local: int, process: Process) -> None:
        ranks.ends[local] = await process.wait()
        self._changed.set()

    def _must_end(self, ranks: _Ranks) -> bool:
        """Whether all ranks of this node have to exit."""
        learner_ended = self._leads and 0 in ranks.ends
        return learner_ended or any(ranks.ends.values()) or self._stopped_by is not None

    async def _end_others(self, ranks: _Ranks, waiting: Sequence[asyncio.Task[None]]) -> bool:
        """Stop all remaining ranks, gracefully if possible. Returns whether some were killed."""
        if self._leads and ranks.ends.get(0) in ORDERLY_STATUSES and not self._stopped_by:
            await asyncio.wait(waiting, timeout=END_GRACE_S)
        if len(ranks.ends) < len(waiting):
            if not self._stopped_by:  # a stop signal was forwarded on arrival
                ranks.signal(signal.SIGTERM)
            grace_s = self._config.cluster.drain_timeout_s + STOP_GRACE_S
            await asyncio.wait(waiting, timeout=grace_s)
        killed = len(ranks.ends) < len(waiting)
        if killed:
            ranks.signal(signal.SIGKILL)
            await asyncio.wait(waiting)
        return killed

    def _stop(self, which: signal.Signals) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._stopped_by is None:
            self._stopped_by, self._stopped_s = which, now_s
            self._ranks.signal(which)
            self._changed.set()
        elif which == signal.SIGINT and now_s - self._stopped_s > FORCE_AFTER_S:
            # The learner restores the terminal and exits; every rank that does not exit is killed.
            self._forced = True
            self._ranks.signal(signal.SIGINT)
            loop = asyncio.get_running_loop()
            loop.call_later(FORCE_GRACE_S, self._ranks.signal, signal.SIGKILL)

    # --- outcome ---------------------------------------------------------------------------------

    def _resolve_end(self, ranks: _Ranks, attempt: str, *, killed: bool) -> _End:
        learner = ranks.ends[0] if self._leads else None
        statuses = ranks.ends.values()
        if learner in ORDERLY_STATUSES:
            first_bad = next((one for one in statuses if one not in ORDERLY_STATUSES), 0)
            # The learner may have been stopped because another rank failed first.
            if learner != EXIT_INTERRUPTED or self._stopped_by or not first_bad:
                return _End(status=learner)
        if self._stopped_by:
            errors = [one for one in statuses if one > 0 and one != EXIT_INTERRUPTED]
            if self._forced or not errors:
                late = "ranks did not exit in time and were killed" if killed else ""
                return _End(status=EXIT_INTERRUPTED, text=late)
        for local, status in ranks.ends.items():
            if status in ORDERLY_STATUSES or (status < 0 and killed):
                continue
            lost = status == EXIT_RUN_LOST
            text = self._error_of(local, attempt, status)
            return _End(status=EXIT_RUN_LOST if lost else EXIT_FAILED, text=text)
        if killed:
            return _End(status=EXIT_FAILED, text="ranks did not exit in time and were killed")
        return _End(status=EXIT_STATUS.get(self._read_record().outcome, 0))

    def _error_of(self, local: int, attempt: str, status: int) -> str:
        """The error that a failed rank recorded, or a description of its exit."""
        try:
            return str(json.loads(self._error_file(local, attempt).read_text())["message"])
        except (OSError, ValueError, KeyError):
            pass
        rank = self._node.rank(local).rank
        is_learner = rank < self._config.cluster.learners
        name = f"learner (rank {rank})" if is_learner else f"rank {rank}"
        how = f"exited with status {status} without an error message"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                how += " (possibly by the kernel's out-of-memory killer)"
        folder = self._read_record().run_folder
        return f"{name}: {how}" + (f"; see {folder}/logs" if folder else "")

    def _report_end(self, end: _End) -> int:
        """Print the final line, unless the learner's summary serves as such; return the status."""
        record = self._read_record()
        if not (self._leads or self._stopped_by or end.text):
            write_stream(remote_end_line(record.outcome), STDERR)
        elif end.status == EXIT_INTERRUPTED:
            parts = [f"stopped by {self._stopped_by.name if self._stopped_by else 'a signal'}"]
            parts += [end.text] if end.text else []
            parts += [resume_hint(record.run_folder)] if record.run_folder else []
            write_stream("; ".join(parts) + "\n", STDERR)
        elif end.status == EXIT_NOTHING_LEARNED:
            write_stream(
                "nothing was learned: no update had a nonzero gradient (status 3)\n", STDERR
            )
        elif end.text:
            write_stream(f"error: {end.text}\n", STDERR)
        return end.status

    # --- files -----------------------------------------------------------------------------------

    @property
    def _leads(self) -> bool:
        return self._node.index == 0

    def _error_file(self, local: int, attempt: str) -> Path:
        return self._rendezvous.path.with_name(f"rank-{local}-attempt-{attempt}.error")

    def _read_record(self) -> RendezvousRecord:
        """The newest record of the ranks, even if the file has been deleted since."""
        record = self._rendezvous.read()
        if record.run_folder or record.outcome:
            self._last_record = record
        return self._last_record

    async def _poll_record(self) -> None:
        while not self._read_record().run_folder:  # noqa: ASYNC110 - polls a file
            await asyncio.sleep(RECORD_POLL_S)
