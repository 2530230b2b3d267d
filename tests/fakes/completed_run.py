"""A run that has completed, and the host on which it runs."""

import shutil
import subprocess
from dataclasses import dataclass

from tests.fakes.run_process import Run

UPDATES = 6
NAMESPACE = ("unshare", "--user", "--map-root-user", "--uts")
IN_NAMESPACE = (*NAMESPACE, "sh", "-c", 'hostname nowhere-at-all.invalid && exec "$@"', "sh")
"""Runs a command on a host whose name cannot be resolved."""


@dataclass(frozen=True, kw_only=True)
class Completed:
    """A run that has completed, and what it printed."""

    run: Run
    out: str
    err: str


def may_set_host_name() -> bool:
    if not shutil.which(NAMESPACE[0]):
        return False
    probe = subprocess.run([*NAMESPACE, "hostname", "x"], capture_output=True, timeout=240)
    return probe.returncode == 0


MAY_SET_HOST_NAME = may_set_host_name()
