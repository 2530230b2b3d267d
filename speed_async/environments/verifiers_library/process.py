"""A process that serves one environment of the `verifiers` library (server.py)."""

import json
import os
import selectors
import subprocess
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speed_async.errors import ConfigError, TaskError

SILENCE_S = 300.0
"""Maximum wait for a reply. Scoring has a shorter limit, that of its verifier worker."""
_SERVER = Path(__file__).with_name("server.py")
_CHUNK_BYTES = 1 << 20


class EnvironmentProcess:
    """Use in one thread: the process is killed when the thread that created it ends."""

    def __init__(self, python: str, environment: str, arguments: Mapping[str, object]) -> None:
        """Raises ConfigError (no such interpreter) or TaskError (no such environment)."""
        try:
            self._process = subprocess.Popen(
                [python, str(_SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
        except OSError as error:
            raise ConfigError(
                "task.python", python, f"it cannot be started ({error.strerror}); correct its path"
            ) from error
        self._kill = weakref.finalize(self, _kill, self._process)
        try:
            reply = self.call({"environment": environment, "arguments": dict(arguments)})
        except TaskError as error:
            self.close()
            raise TaskError(
                f"the environment '{environment}' of verifiers cannot be loaded by {python} "
                f"({error}): install it and 'verifiers>=0.3.1,<0.4' there, or set task.python to "
                "an interpreter that has them"
            ) from error
        self.files = [Path(each) for each in reply["files"]]
        """The source of the environment."""

    def call(self, request: Mapping[str, object]) -> dict[str, Any]:
        """The reply to a request. Raises TaskError when there is none, or it is an error."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
        except OSError:
            raise self._ended() from None
        reply = json.loads(self._line())
        if "error" in reply:
            raise TaskError(reply["error"])
        return reply

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        """Kill the process."""
        self._kill()

    def _line(self) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None
        chunks: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not chunks or not chunks[-1].endswith(b"\n"):
                if not selector.select(SILENCE_S):
                    self.close()
                    raise TaskError(f"the environment did not reply within {SILENCE_S:g} s")
                chunks.append(os.read(stdout.fileno(), _CHUNK_BYTES))
                if not chunks[-1]:
                    raise self._ended()
        return b"".join(chunks)

    def _ended(self) -> TaskError:
        self.close()
        return TaskError(f"the environment ended its process (status {self._process.returncode})")


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
