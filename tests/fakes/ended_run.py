"""What holds for a run that was drained by a signal, or has been resumed and has completed."""

import signal

from tests.fakes.run_process import Run

OFTEN = ("--learner.checkpoint_every", "2")
GROUPS, COMPLETIONS = 2, 8
"""Per update."""


def assert_whole(run: Run, status: int, err: str, *, updates: int) -> None:
    """One lineage from the first update to the last, in one folder, with a balanced ledger."""
    assert status == 0, err
    summary = run.summary()
    assert summary["policy_version"] == updates
    assert summary["optimizer_updates"] + summary["skipped_updates"] == updates
    assert summary["completions_trained"] == COMPLETIONS * summary["optimizer_updates"]
    assert summary["ledger"]["groups"]["trained"] == GROUPS * summary["optimizer_updates"]
    assert summary["ledger"]["checks"] == dict.fromkeys(summary["ledger"]["checks"], True)
    assert sorted(set(run.versions())) == list(range(1, updates + 1))
    assert sorted(path.name for path in run.folder.parent.iterdir()) == ["config.toml", "run"]
    assert (run.folder / "checkpoints" / f"version-{updates:06d}" / "SHA256SUMS").is_file()
    assert run.processes() == {}


def drain(run: Run, which: signal.Signals) -> str:
    """Send a stop signal to the launcher: the run drains, saves and leaves no process. Returns
    stdout."""
    run.process.send_signal(which)
    status, out, err = run.finish()
    assert status == 130, err
    # The last line contains the resume command.
    last = err.splitlines()[-1]
    assert last == f"stopped by {which.name}; to resume: speed-async train --resume {run.folder}"
    run.assert_saved()
    assert run.processes() == {}
    return out
