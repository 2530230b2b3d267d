"""The best checkpoint of each suite: it is kept, and linked as `best-SUITE`.

A checkpoint takes part when its version was evaluated: its score is the accuracy of that version.
The checkpoint of a version under evaluation is kept until the result is known. `best.json` has the
version and the accuracy by suite.
"""

import contextlib
import json
import os
from pathlib import Path

from speed_async.config.whole_file import write_atomically
from speed_async.learner.checkpoint.store import checkpoint_folder, kept_versions

BEST_FILE = "best.json"
LINK_PREFIX = "best-"


class BestCheckpoints:
    def __init__(self, root: Path) -> None:
        """`root`: folder of the checkpoints of the run."""
        self._root = root
        self._running: dict[str, int] = {}
        """Versions under evaluation by suite."""
        self._results: dict[tuple[str, int], float] = {}
        """Results by suite and version, until the checkpoint of that version or a later one is
        written."""
        self._best = self._read()

    @property
    def kept(self) -> set[int]:
        """Versions whose checkpoints must not be removed."""
        running, results = list(self._running.values()), list(self._results)
        return {*running, *(v for _, v in results), *(v for v, _ in self._best.values())}

    def began(self, suite: str, policy_version: int) -> None:
        """The evaluation of this version began."""
        self._running[suite] = policy_version

    def ended(self, suite: str, policy_version: int, accuracy: float) -> None:
        """The result of an evaluation; a repeated one changes nothing. Raises OSError."""
        self._results[suite, policy_version] = accuracy
        if self._running.get(suite) == policy_version:
            del self._running[suite]
        self.update()

    def update(self) -> None:
        """Take up results whose checkpoint now exists, and link the best ones. Raises OSError."""
        existing = kept_versions(self._root)
        for (suite, version), accuracy in sorted(self._results.items()):
            if version not in existing:
                if existing and version < existing[-1]:  # it was never written
                    del self._results[suite, version]
                continue
            best = self._best.get(suite)
            if best is None or accuracy > best[1]:
                self._link(suite, version)
                self._best[suite] = version, accuracy
                self._write()
            del self._results[suite, version]

    def _link(self, suite: str, version: int) -> None:
        link = self._root / f"{LINK_PREFIX}{suite}"
        new = link.with_name(f".{link.name}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(checkpoint_folder(self._root, version).name)
        os.replace(new, link)

    def _write(self) -> None:
        record = {
            suite: {"policy_version": version, "accuracy": accuracy}
            for suite, (version, accuracy) in self._best.items()
        }
        write_atomically(self._root / BEST_FILE, json.dumps(record, indent=2) + "\n")

    def _read(self) -> dict[str, tuple[int, float]]:
        """The best checkpoints of earlier attempts that still exist."""
        existing = kept_versions(self._root)
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            record = json.loads((self._root / BEST_FILE).read_text(encoding="utf-8"))
            return {
                suite: (entry["policy_version"], float(entry["accuracy"]))
                for suite, entry in record.items()
                if entry["policy_version"] in existing
            }
        return {}
