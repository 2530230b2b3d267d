"""The files of examples/ run as they are."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.fakes.command_line import run_command
from tests.fakes.ended_run import drain
from tests.fakes.paths import REPOSITORY
from tests.fakes.run_process import DEADLINE_S, Run

EXAMPLES = REPOSITORY / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


CONFIGS = sorted(EXAMPLES.glob("*.toml"))
IN_OTHER_RUNS = ("own_data", "own_task")
"""test_resume_changed.py trains on a data file, test_extending.py on a task by import path."""


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_each_config_passes_the_checks_of_train(config: Path) -> None:
    """They load the task, score answers with its rewards, and encode prompts."""
    status, out, err = run_command(REPOSITORY, "train", str(config), "--dry-run")
    assert (status, out.splitlines()[-1], err) == (0, "ok", "")


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            path,
            marks=[pytest.mark.slow] if path.stem in IN_OTHER_RUNS else [],
            id=path.stem,
        )
        for path in CONFIGS
    ],
)
def test_each_config_trains_from_the_root_of_the_repository_until_sigterm(
    config: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "speed_async", "train", str(config)]
    command += ["--run.folder", str(folder), "--run.updates", "1000", "--evaluate.every", "0"]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    run = Run(process=process, folder=folder)
    run.wait_for_steps(2)
    drain(run, signal.SIGTERM)
    assert run.summary()["policy_version"] >= 2
    assert tomllib.loads(config.read_text())["run"]["folder"].startswith("runs/")


def test_the_minimal_loop_trains_the_quickstart_s_model() -> None:
    command = [sys.executable, str(EXAMPLES / "minimal_loop.py"), "--updates", "3"]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1", "2", "3"]
    assert re.fullmatch(r"generated tokens: [\d,]+ trained, [\d,]+ screened out, .*", lines[-1])


def test_the_minimal_loop_can_be_read_in_one_sitting() -> None:
    assert len((EXAMPLES / "minimal_loop.py").read_text().splitlines()) < 200
