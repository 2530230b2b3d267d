"""Processes that only start and watch others import neither torch nor transformers."""

import subprocess
import sys

import pytest

ROLES = "speed_async.launcher.roles"
LIGHT = [
    "speed_async.cli",
    "speed_async.launch",
    "speed_async.launcher.child",
    f"{ROLES}.actor_rank",
    f"{ROLES}.console_role",
    f"{ROLES}.joiner",
    f"{ROLES}.service_role",
]


@pytest.mark.parametrize("module", LIGHT)
def test_module_of_a_light_process_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}\nprint(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "[]"
