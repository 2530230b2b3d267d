"""The wandb sink. Only this module imports wandb: import it only if the run uses wandb."""

import netrc
import os
import uuid
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import wandb

from speed_async.errors import ConfigError
from speed_async.observability.metrics import Event, Value
from speed_async.observability.sinks import METRICS_FILE

LEGACY_HOST = "api.wandb.ai"
INIT_TIMEOUT_S = 30.0
ID_FILE = "wandb-run-id"
"""File in the run folder with the wandb run id, so a resumed run continues the wandb run."""
AXES = ("policy_version", "wall_s")
EVALUATION_KEYS = (
    "accuracy",
    "num_passed",
    "num_completions",
    "num_unscored",
    "oldest_version",
    "newest_version",
)
"""Logged keys of an evaluation event; its other gauges are logged with steps."""
SUITE_KEYS = ("mean", "num_truncated", *EVALUATION_KEYS[1:])
"""Logged keys of a suite event, below `suite/NAME/`."""
SAMPLE_COLUMNS = (
    "policy_version",
    "prompt_id",
    "held_out",
    "decision",
    "reward",
    "passed",
    "extracted",
    "truncated",
    "num_tokens",
    "prompt",
    "completion",
)
MAX_SAMPLES = 64
SAMPLES_EVERY = 50
"""Maximum steps between sample tables; evaluations also log one."""


class WandbSink:
    """Logs steps, evaluations and a table of samples to wandb, without output or prompts.

    The `_step` of wandb is the number of previous events in the run folder over all attempts.
    Offline, wandb restarts at 0 after a resume, and the server keeps only one row per step when
    both files are uploaded.

    The mode is offline without an API key (WANDB_API_KEY, or a netrc entry for the server).
    WANDB_MODE is respected, except that `online` without a key is offline. Files are in
    `run_folder`/wandb.
    """

    def __init__(
        self,
        *,
        run_folder: Path,
        project: str,
        config: Mapping[str, object],
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """`config` is the resolved configuration as plain values.

        Raises ConfigError (`observe.wandb`) if the server rejects the key or does not respond
        within 30 s.
        """
        environ = os.environ if environ is None else environ
        run_folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=INIT_TIMEOUT_S, disable_git=True
        )
        api_key = find_api_key(environ, host=urlsplit(settings.base_url).netloc)
        self.mode = choose_mode(environ, has_key=api_key is not None)
        if self.mode == "online":
            settings.api_key = api_key
        self._run: wandb.Run | None = _init(run_folder, project, config, self.mode, settings)
        self._run.define_metric("*", step_metric="policy_version")
        self._next_step = max(self._run.starting_step, _num_events(run_folder))
        self._samples: deque[tuple[Value, ...]] = deque(maxlen=MAX_SAMPLES)
        self._has_new_samples = False
        self._steps_since_samples = 0

    def write(self, event: Event) -> None:
        run = self._run
        if run is None or event.kind == "status":
            return
        if event.kind == "sample":
            self._samples.append(tuple(event.values.get(key) for key in SAMPLE_COLUMNS))
            self._has_new_samples = True
            return
        row = row_of(event) | self._sample_table(event)
        if event.kind == "end":
            run.summary.update({f"end/{key}": item for key, item in event.values.items()})
        # Commit immediately: an uncommitted row is lost if the process is killed.
        run.log(row, step=self._next_step, commit=True)
        self._next_step += 1

    def _sample_table(self, event: Event) -> dict[str, object]:
        """The last samples as a table, at intervals, because each table is a separate file."""
        self._steps_since_samples += 1
        is_due = event.kind != "step" or self._steps_since_samples >= SAMPLES_EVERY
        if not (is_due and self._has_new_samples):
            return {}
        self._has_new_samples, self._steps_since_samples = False, 0
        rows: list[Iterable[Value]] = [[_cell(item) for item in row] for row in self._samples]
        return {"samples": wandb.Table(columns=list(SAMPLE_COLUMNS), data=rows)}

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def row_of(event: Event) -> dict[str, object]:
    """The logged values of an event; those of a suite are below `suite/NAME/`."""
    axes = {key: event.values.get(key) for key in AXES}
    if event.kind == "end":
        return {key: item for key, item in axes.items() if item is not None}
    keys, prefix = event.values.keys(), str(event.kind)
    if event.kind == "evaluation":
        keys = EVALUATION_KEYS
    elif event.kind == "suite":
        keys, prefix = SUITE_KEYS, f"suite/{event.values.get('suite')}"
    named = {f"{prefix}/{key}": event.values.get(key) for key in keys if key not in AXES}
    return {key: item for key, item in (axes | named).items() if item is not None}


def choose_mode(environ: Mapping[str, str], *, has_key: bool) -> str:
    """`online`, `offline` or `disabled`."""
    requested = environ.get("WANDB_MODE", "online")
    if requested in ("offline", "dryrun"):
        return "offline"
    if requested == "disabled":
        return "disabled"
    return "online" if has_key else "offline"


def find_api_key(environ: Mapping[str, str], *, host: str) -> str | None:
    """Read the key from the environment or netrc; None if there is none."""
    if key := environ.get("WANDB_API_KEY"):
        return key
    path = Path(environ.get("NETRC") or Path(environ.get("HOME", "~")).expanduser() / ".netrc")
    try:
        entries = netrc.netrc(path)
    except (OSError, netrc.NetrcParseError):
        return None
    # `hosts`, not `authenticators`, which would use a netrc `default` entry.
    entry = entries.hosts.get(host) or entries.hosts.get(LEGACY_HOST)
    return entry[2] or None if entry else None


def _num_events(run_folder: Path) -> int:
    """Number of lines of metrics.jsonl; each event has a step."""
    path = run_folder / METRICS_FILE
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _cell(item: Value) -> Value:
    """Convert integers to float: a table column has a single type."""
    return float(item) if isinstance(item, int) and not isinstance(item, bool) else item


def _run_id(run_folder: Path) -> str:
    """The wandb run id of this run folder, created on first use."""
    path = run_folder / ID_FILE
    if not path.is_file():
        pending = path.with_name(f".{ID_FILE}.partial")
        pending.write_text(uuid.uuid4().hex[:12] + "\n")
        pending.replace(path)
    return path.read_text().strip()


def _init(
    run_folder: Path,
    project: str,
    config: Mapping[str, object],
    mode: str,
    settings: wandb.Settings,
) -> wandb.Run:
    try:
        return wandb.init(
            project=project,
            name=run_folder.resolve().name,
            id=_run_id(run_folder),
            resume="allow",
            dir=str(run_folder),
            config=dict(config),
            mode=mode,  # pyright: ignore[reportArgumentType]
            settings=settings,
        )
    except wandb.Error as error:
        raise ConfigError(
            "observe.wandb", True, f"wandb failed to start ({error}); set WANDB_MODE=offline"
        ) from error
