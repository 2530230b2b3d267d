"""How the launcher of a node handles the exits of its ranks."""

import asyncio
import signal
from pathlib import Path

import pytest

from speed_async.launcher.exit_status import EXIT_FAILED, EXIT_INTERRUPTED
from speed_async.launcher.node_launcher import _Launcher, _Ranks
from speed_async.launcher.rank import Node
from speed_async.launcher.rendezvous import RendezvousFile
from tests.fakes.buffer_fixtures import make_config


@pytest.mark.parametrize(("num_signals", "status"), [(1, EXIT_FAILED), (2, EXIT_INTERRUPTED)])
def test_an_error_counts_after_one_ctrl_c_and_not_after_two(
    tmp_path: Path, num_signals: int, status: int
) -> None:
    """After the second Ctrl-C the actors' ranks lose the service, which is no failure."""
    (tmp_path / "config.json").write_text("{}")
    launcher = _Launcher(
        make_config(str(tmp_path)), [], Node(num_ranks=2), RendezvousFile(tmp_path)
    )

    async def stop() -> None:
        for _ in range(num_signals):
            launcher._stop(signal.SIGINT)
            launcher._stopped_s -= 10.0

    asyncio.run(stop())
    ranks = _Ranks(ends={1: 1, 0: -signal.SIGKILL})
    assert launcher._resolve_end(ranks, "0", killed=True).status == status
