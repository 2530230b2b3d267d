"""Processes that only start and watch others import neither torch nor transformers."""

import subprocess
import sys

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


def test_module_of_a_light_process_loads_no_torch() -> None:
    code = (
        "import importlib, sys\n"
        f"for module in {LIGHT}:\n"
        "    importlib.import_module(module)\n"
        "    print(module, sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.splitlines() == [f"{module} []" for module in LIGHT]
