"""The wandb sink. The only importer of wandb: import this module only where a run asks for it."""

import netrc
import os
import uuid
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import wandb

from speed_async.errors import ConfigError
from speed_async.observability.metrics import Event, Value
from speed_async.observability.sinks import METRICS_FILE

LEGACY_HOST = "api.wandb.ai"
INIT_TIMEOUT_S = 30.0
ID_FILE = "wandb-run-id"
"""In the run folder: a run that is resumed goes on as the same run of wandb."""
AXES = ("policy_version", "wall_s")
EVALUATION_KEYS = ("accuracy", "num_passed", "num_completions", "oldest_version", "newest_version")
"""The gauges an evaluation event carries besides are those of the steps around it."""
SAMPLE_COLUMNS = (
    "policy_version",
    "prompt_id",
    "held_out",
    "decision",
    "reward",
    "extracted",
    "truncated",
    "num_tokens",
    "prompt",
    "completion",
)
MAX_SAMPLES = 64
SAMPLES_EVERY = 50
"""Steps between two tables of samples, where no evaluation comes first."""


class WandbSink:
    """Logs steps, evaluations and a table of samples to wandb, silently and without a prompt.

    wandb's `_step` is the number of events that came before in this run folder, in all lives of the
    run: offline, wandb itself would count from 0 again when the run is resumed, and a server that
    is sent both files keeps one row a step.

    Offline when no API key is found (WANDB_API_KEY, or a netrc entry for the server); WANDB_MODE
    is obeyed, save that `online` without a key means offline. Files lie in `run_folder`/wandb.
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

        Raises ConfigError (`observe.wandb`) when there is a key and the server refuses it or
        does not answer within 30 s.
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
        row = self._row(event) | self._sample_table(event)
        if event.kind == "end":
            run.summary.update({f"end/{key}": item for key, item in event.values.items()})
        # Committed at once: a row that waits for the next step is lost with a killed process.
        run.log(row, step=self._next_step, commit=True)
        self._next_step += 1

    def _row(self, event: Event) -> dict[str, object]:
        axes = {key: event.values.get(key) for key in AXES}
        if event.kind == "end":
            return {key: item for key, item in axes.items() if item is not None}
        keys = EVALUATION_KEYS if event.kind == "evaluation" else event.values
        named = {f"{event.kind}/{key}": event.values.get(key) for key in keys if key not in AXES}
        return {key: item for key, item in (axes | named).items() if item is not None}

    def _sample_table(self, event: Event) -> dict[str, object]:
        """The last samples as a table, now and then: each table is a file of its own."""
        self._steps_since_samples += 1
        is_due = event.kind != "step" or self._steps_since_samples >= SAMPLES_EVERY
        if not (is_due and self._has_new_samples):
            return {}
        self._has_new_samples, self._steps_since_samples = False, 0
        rows = [[_cell(item) for item in row] for row in self._samples]
        return {"samples": wandb.Table(columns=list(SAMPLE_COLUMNS), data=rows)}

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def choose_mode(environ: Mapping[str, str], *, has_key: bool) -> str:
    """`online`, `offline` or `disabled`."""
    asked = environ.get("WANDB_MODE", "online")
    if asked in ("offline", "dryrun"):
        return "offline"
    if asked == "disabled":
        return "disabled"
    return "online" if has_key else "offline"


def find_api_key(environ: Mapping[str, str], *, host: str) -> str | None:
    """The key from the environment or from netrc; None when there is none to be read."""
    if key := environ.get("WANDB_API_KEY"):
        return key
    path = Path(environ.get("NETRC") or Path(environ.get("HOME", "~")).expanduser() / ".netrc")
    try:
        entries = netrc.netrc(path)
    except (OSError, netrc.NetrcParseError):
        return None
    # `hosts`, not `authenticators`: a netrc `default` entry is no key of wandb's.
    entry = entries.hosts.get(host) or entries.hosts.get(LEGACY_HOST)
    return entry[2] or None if entry else None


def _num_events(run_folder: Path) -> int:
    """Lines of metrics.jsonl: each is an event that has, or could have had, a step here."""
    path = run_folder / METRICS_FILE
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _cell(item: Value) -> Value:
    """A column of a table has one type."""
    return float(item) if isinstance(item, int) and not isinstance(item, bool) else item


def _run_id(run_folder: Path) -> str:
    """The one of this run folder, made when it is first asked for."""
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
            "observe.wandb", True, f"wandb cannot start ({error}); set WANDB_MODE=offline"
        ) from error
