"""`speed-async train`: starts the ranks of one node, watches them, and starts them again.

consumes   the ends of the ranks, stop signals (which it hands on), the notice of its ranks
restarts   all ranks of this node, up to cluster.max_restarts, when one failed; never a run that
           came to its end, was stopped, or was lost
ends       within cluster.drain_timeout_s and STOP_GRACE_S of a stop, and with one sentence

It opens no socket. Ranks that outlive it drain by themselves (speed_async/launch.py).
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
    EXIT_LOST_RUN,
    EXIT_NOTHING_LEARNED,
    EXIT_STATUS,
    ended_elsewhere,
    to_go_on,
)
from speed_async.launcher.processes import ENVIRONMENT
from speed_async.launcher.rank import Node, check_world
from speed_async.launcher.rendezvous import FOLDER_VARIABLE, RendezvousFile, RendezvousRecord
from speed_async.launcher.standard_streams import STDERR, tell

PROCESS_VARIABLE = "SPEED_ASYNC_LAUNCHER"
"""Process id of the launcher, for its ranks."""
STOP_GRACE_S = 60.0
"""On top of the drain: an update under way may end and a checkpoint be written."""
END_GRACE_S = 15.0
"""When the run has ended, its actors' ranks have this long to hear of it and to end."""
NOTICE_POLL_S = 0.5
INSIST_S = 1.0
"""A second Ctrl-C, this long after the first one, ends the run at once: within INSIST_GRACE_S."""
INSIST_GRACE_S = 3.0
IN_ORDER = (0, EXIT_NOTHING_LEARNED, EXIT_INTERRUPTED)
"""Statuses of a learner whose run has ended as it should."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _End:
    """How the ranks of this node ended."""

    status: int
    text: str = ""
    """Of a failure: the error of whoever failed first."""


def launch_node(config: Config, arguments: Sequence[str], node: Node) -> int:
    """Run this node's ranks; returns the exit status of the run. Raises ConfigError."""
    check_world(config, node.rank(0))
    try:
        folder = Path(tempfile.mkdtemp(prefix="speed_async-"))
    except OSError as error:
        raise SpeedAsyncError(
            f"no folder for temporary files can be made ({error}): set TMPDIR to one that can be "
            "written"
        ) from None
    try:
        # Not uvloop, which gives its children back the signals that nohup has taken from them.
        return asyncio.run(_Launcher(config, arguments, node, RendezvousFile(folder)).run())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(kw_only=True)
class _Ranks:
    """The processes of one start of all ranks."""

    processes: dict[int, Process] = field(default_factory=dict)
    """By local rank."""
    ends: dict[int, int] = field(default_factory=dict)
    """Statuses, in the order in which they ended."""

    def signal(self, which: signal.Signals) -> None:
        for local, process in self.processes.items():
            if local not in self.ends and process.returncode is None:
                process.send_signal(which)


class _Launcher:
    def __init__(
        self, config: Config, arguments: Sequence[str], node: Node, notice: RendezvousFile
    ) -> None:
        self._config = config
        self._arguments = arguments
        self._node = node
        self._notice = notice
        self._noted = RendezvousRecord()
        """What the ranks last told; the file may be cleaned away in a long run."""
        self._ranks = _Ranks()
        self._stopped_by: signal.Signals | None = None
        self._stopped_s = 0.0
        self._changed = asyncio.Event()
        """A rank has ended, or a stop signal came."""

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for stopper in stop_signals():
            loop.add_signal_handler(stopper, self._stop, stopper)
        watching = asyncio.create_task(self._watch_notice(), name="notice")
        restarts = 0
        try:
            while True:
                end = await self._run_ranks(str(restarts))
                failed = end.status == EXIT_FAILED
                if not failed or self._stopped_by or restarts == self._config.cluster.max_restarts:
                    break
                restarts += 1
                tell(f"{end.text}; starting all ranks again (restart {restarts})\n", STDERR)
                # Where the run goes on; nobody serves it at the old address.
                folder = self._read_notice().run_folder
                self._notice = RendezvousFile(self._notice.path.parent)
                self._notice.write(RendezvousRecord(run_folder=folder))
        finally:
            watching.cancel()
        return self._say_how_it_ended(end)

    # --- one start of all ranks ------------------------------------------------------------------

    async def _run_ranks(self, life: str) -> _End:
        self._ranks = ranks = _Ranks()
        waiting: list[asyncio.Task[None]] = []
        for local in range(self._node.num_ranks):
            process = await self._start(local, life)
            ranks.processes[local] = process
            waiting.append(asyncio.create_task(self._await_end(ranks, local, process)))
        if self._stopped_by:  # it came while they were started
            ranks.signal(self._stopped_by)
        while not self._is_decided(ranks) and len(ranks.ends) < len(waiting):
            await self._changed.wait()
            self._changed.clear()
        killed = await self._end_others(ranks, waiting)
        return self._end_of(ranks, life, killed=killed)

    async def _start(self, local: int, life: str) -> Process:
        rank = self._node.rank(local)
        own = {
            "RANK": str(rank.rank),
            "WORLD_SIZE": str(rank.world_size),
            "LOCAL_RANK": str(rank.local_rank),
            "LOCAL_WORLD_SIZE": str(rank.local_world_size),
            "TORCHELASTIC_ERROR_FILE": str(self._error_file(local, life)),
            FOLDER_VARIABLE: str(self._notice.path.parent),
            PROCESS_VARIABLE: str(os.getpid()),
        }
        # A session of its own keeps the terminal's Ctrl-C away from it: it is handed on.
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "speed_async.launch",
            *self._arguments,
            env=ENVIRONMENT | dict(os.environ) | own,
            start_new_session=True,
        )

    async def _await_end(self, ranks: _Ranks, local: int, process: Process) -> None:
        ranks.ends[local] = await process.wait()
        self._changed.set()

    def _is_decided(self, ranks: _Ranks) -> bool:
        """Whether what has happened ends all ranks of this node."""
        learner_ended = self._leads and 0 in ranks.ends
        return learner_ended or any(ranks.ends.values()) or self._stopped_by is not None

    async def _end_others(self, ranks: _Ranks, waiting: Sequence[asyncio.Task[None]]) -> bool:
        """Have all ranks end, in order if they can; True when some had to be killed."""
        if self._leads and ranks.ends.get(0) in IN_ORDER and not self._stopped_by:
            await asyncio.wait(waiting, timeout=END_GRACE_S)
        if len(ranks.ends) < len(waiting):
            # A stop was handed on when it came.
            if not self._stopped_by:
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
        elif which == signal.SIGINT and now_s - self._stopped_s > INSIST_S:
            # The learner gives the terminal back and ends; whoever does not end is killed.
            self._ranks.signal(signal.SIGINT)
            loop = asyncio.get_running_loop()
            loop.call_later(INSIST_GRACE_S, self._ranks.signal, signal.SIGKILL)

    # --- what it comes to ------------------------------------------------------------------------

    def _end_of(self, ranks: _Ranks, life: str, *, killed: bool) -> _End:
        learner = ranks.ends[0] if self._leads else None
        if learner in IN_ORDER:
            first_bad = next((one for one in ranks.ends.values() if one not in IN_ORDER), 0)
            # A learner that was told to stop because another rank had failed first.
            if learner != EXIT_INTERRUPTED or self._stopped_by or not first_bad:
                return _End(status=learner)
        if self._stopped_by:
            own = [one for one in ranks.ends.values() if one > 0 and one != EXIT_INTERRUPTED]
            if not own:
                late = "ranks did not end in time after that and were killed" if killed else ""
                return _End(status=EXIT_INTERRUPTED, text=late)
        for local, status in ranks.ends.items():
            if status in IN_ORDER or (status < 0 and killed):
                continue
            lost = status == EXIT_LOST_RUN
            text = self._error_of(local, life, status)
            return _End(status=EXIT_LOST_RUN if lost else EXIT_FAILED, text=text)
        if killed:
            return _End(status=EXIT_FAILED, text="ranks did not end in time and were killed")
        noted = self._read_notice()
        return _End(status=EXIT_STATUS.get(noted.outcome, 0))

    def _error_of(self, local: int, life: str, status: int) -> str:
        """What a rank that failed has said, or what is known of it."""
        try:
            return str(json.loads(self._error_file(local, life).read_text())["message"])
        except (OSError, ValueError, KeyError):
            pass
        rank = self._node.rank(local).rank
        who = "learner (rank 0)" if rank < self._config.cluster.learners else f"rank {rank}"
        how = f"ended with status {status} without a word"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                how += " (the kernel does that to whom memory has run out)"
        folder = self._read_notice().run_folder
        return f"{who}: {how}" + (f"; read {folder}/logs" if folder else "")

    def _say_how_it_ended(self, end: _End) -> int:
        """The last sentence on this terminal, where a learner's summary is not that already."""
        noted = self._read_notice()
        if not (self._leads or self._stopped_by or end.text):
            tell(ended_elsewhere(noted.outcome), STDERR)
        elif end.status == EXIT_INTERRUPTED:
            parts = [f"stopped by {self._stopped_by.name if self._stopped_by else 'a signal'}"]
            parts += [end.text] if end.text else []
            parts += [to_go_on(noted.run_folder)] if noted.run_folder else []
            tell("; ".join(parts) + "\n", STDERR)
        elif end.status == EXIT_NOTHING_LEARNED:
            tell("nothing was learned: no update had a gradient to follow (status 3)\n", STDERR)
        elif end.text:
            tell(f"error: {end.text}\n", STDERR)
        return end.status

    # --- files -----------------------------------------------------------------------------------

    @property
    def _leads(self) -> bool:
        return self._node.index == 0

    def _error_file(self, local: int, life: str) -> Path:
        return self._notice.path.with_name(f"rank-{local}-life-{life}.error")

    def _read_notice(self) -> RendezvousRecord:
        """What the ranks have told, also when the file has been cleaned away since."""
        noted = self._notice.read()
        if noted.run_folder or noted.outcome:
            self._noted = noted
        return self._noted

    async def _watch_notice(self) -> None:
        while not self._read_notice().run_folder:  # noqa: ASYNC110 - a file to look at
            await asyncio.sleep(NOTICE_POLL_S)
