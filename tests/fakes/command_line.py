"""Runs `speed-async` in this process, for commands that end before they start another one."""

import io
import os
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from speed_async.cli import main


def run_command(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run the command in `folder`; returns exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with (
        chdir(folder),
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", ["speed-async", *arguments]),
        patch.dict(os.environ),
    ):
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
    return status, out.getvalue(), err.getvalue()
