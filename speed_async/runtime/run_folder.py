"""The run folder: who writes what where."""

import json
from dataclasses import dataclass
from pathlib import Path

from speed_async.config.load import save_config
from speed_async.config.schema import Config
from speed_async.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def log(self, role: str) -> Path:
        return self.path / "logs" / f"{role}.log"

    def error(self, role: str) -> Path:
        return self.path / "logs" / f"{role}.error"

    def failed(self, role: str) -> Path:
        """Completions that this actor's verifier could not score."""
        return self.path / "failed" / f"{role}.jsonl"

    def write_summary(self, fields: dict[str, object]) -> None:
        self.summary.write_text(json.dumps(fields, indent=2) + "\n")


def make_run_folder(config: Config) -> tuple[RunFolder, Config]:
    """Make the configured folder, or the first free one of folder-2, folder-3, ...

    Returns it with the config that names it, which is also written there. Raises ConfigError.
    """
    wanted = Path(config.run.folder).expanduser().resolve()
    path = wanted
    number = 1
    try:
        while not _claim(path):
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")
    except OSError as error:
        raise ConfigError(
            "run.folder", config.run.folder, f"cannot be made ({error.strerror})"
        ) from None
    folder = RunFolder(path=path)
    run = config.run.model_copy(update={"folder": str(path)})
    resolved = config.model_copy(update={"run": run})
    save_config(resolved, folder.config)
    return folder, resolved


def _claim(path: Path) -> bool:
    """Make the folder ours; False when something is there already. One call of two wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not (path.is_dir() and not any(path.iterdir())):
        try:
            path.mkdir()
        except FileExistsError:
            return False
    try:
        (path / "logs").mkdir()
    except FileExistsError:
        return False
    return True
