"""The examples of docs/extending.md run as they are."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.ended_run import drain
from tests.fakes.paths import REPOSITORY
from tests.fakes.run_process import DEADLINE_S, Run, start_train, write_config

BLOCK = re.compile(r"```python\n# (\w+\.py)\n(.*?)```", re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the modules of the page."""
    page = (REPOSITORY / "docs" / "extending.md").read_text()
    for name, code in BLOCK.findall(page):
        (tmp_path / name).write_text(code)
    return tmp_path


def test_a_run_uses_parts_that_are_named_by_import_path_and_is_drained_by_sighup(
    folder: Path,
) -> None:
    parts = ["--task.name", "my_task:make_reversal", "--task.num_held_out", "8"]
    parts += ["--objective.advantage", "my_advantage:median_baseline"]
    parts += ["--objective.policy_loss", "my_loss:penalized", "--task.reward", "my_reward:close"]
    names = {"reward/close", "reward/close/digits"}
    run: Run = start_train(folder, *parts, "--run.updates", "100000", "--gate.mode", "off")
    run.wait_for(
        "an update after a report of the actor about its rewards",
        lambda: any(names <= set(event) for event in run.events("step")),
    )
    drain(run, signal.SIGHUP)
    assert run.summary()["policy_version"] >= 1


def test_a_script_trains_with_registered_names_and_gets_the_summary(folder: Path) -> None:
    write_config(folder).rename(folder / "my.toml")
    script = folder / "my_run.py"
    script.write_text(
        script.read_text().replace('"my.toml", [', '"my.toml", ["--gate.mode", "off",')
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split()[0] in ("completed", "nothing_learned")
