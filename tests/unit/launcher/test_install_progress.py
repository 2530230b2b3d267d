"""scripts/progress.sh: reports installation steps with times, and fails when pip fails."""

import subprocess
from pathlib import Path

import pytest

from tests.fakes.paths import REPOSITORY

PROGRESS = REPOSITORY / "scripts" / "progress.sh"


@pytest.mark.parametrize(("status", "last"), [(0, "done"), (3, "begin")])
def test_steps_have_times_and_a_pip_failure_ends_the_script(
    tmp_path: Path, status: int, last: str
) -> None:
    pip = tmp_path / "python"
    pip.write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/called"\nexit {status}\n')
    pip.chmod(0o755)
    script = f'set -euo pipefail; python="{pip}"; source "{PROGRESS}"; '
    script += "step begin; pip_install one two; step done"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == status, done.stderr
    assert done.stdout.split()[-1] == last
    assert done.stdout.split()[1] == "s"
    assert (tmp_path / "called").read_text().split()[-2:] == ["one", "two"]
