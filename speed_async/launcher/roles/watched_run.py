"""Reads the address of the feed and the history of a run from its folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from speed_async.config.load import read_resolved
from speed_async.errors import DataError, DeadlineExceeded, SpeedAsyncError
from speed_async.launcher.roles.console_role import Source, show_past, watch
from speed_async.launcher.run_folder import RunFolder
from speed_async.observability.metrics import Event
from speed_async.observability.notation import duration
from speed_async.observability.sinks import METRICS_FILE, read_events
from speed_async.transport.curve import ClientKeys, client_keys

SAMPLES_FILE = "samples.jsonl"
NUM_SAMPLES = 3


async def watch_folder(path: Path, keys: ClientKeys | None = None) -> None:
    """Show the run in this folder live, or its last state if it has ended.

    `keys`: overrides the run's own keys. Raises SpeedAsyncError.
    """
    folder = RunFolder(path=path)
    if not folder.config.is_file():
        raise SpeedAsyncError(f"'{path}' is not a run folder: it has no {folder.config.name}")
    history = history_of(path)
    has_ended = bool(history) and history[-1].kind == "end"
    try:
        config = read_resolved(folder.config)
        host, port = _feed_address(folder)
        source = Source(
            host=host,
            port=port,
            title=path.name,
            keys=keys or client_keys(config.cluster),
            history=history,
        )
        await watch(source)
    except DeadlineExceeded as error:
        if has_ended:
            show_past(path.name, history)
            return
        raise _not_running(path, history, error) from None


def history_of(path: Path) -> list[Event]:
    """Steps, evaluations, end events and the last samples of this run folder, samples first."""
    metrics = path / METRICS_FILE
    events = read_events(metrics) if metrics.is_file() else []
    return [*_last_samples(path / SAMPLES_FILE), *events]


def _last_samples(path: Path) -> list[Event]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    samples: list[Event] = []
    for line in lines[-NUM_SAMPLES:]:
        try:
            values = json.loads(line)
            values.pop("kind", None)
        except (ValueError, AttributeError):
            raise DataError(f"{path}: a line is not a JSON object: {line[:80]!r}") from None
        samples.append(Event(kind="sample", values=values))
    return samples


def _feed_address(folder: RunFolder) -> tuple[str, int]:
    try:
        address = json.loads(folder.address.read_text())
        return str(address["host"]), int(address["feed_port"])
    except FileNotFoundError:
        raise DeadlineExceeded(
            f"the run in '{folder.path}'", "its service has not started yet", 0.0
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder.address}: not the address of a run ({error})") from None


def _not_running(path: Path, history: Sequence[Event], error: DeadlineExceeded) -> SpeedAsyncError:
    last = history[-1] if history else None
    state = "it has written no metrics"
    if last is not None:
        version, wall_s = last.values.get("policy_version"), last.values.get("wall_s")
        state = f"its last event is of version {version}, {duration(wall_s)} after its start"
    return SpeedAsyncError(
        f"the run in '{path}' does not respond ({error}); {state}. If it is not running, resume "
        f"it: speed-async train --resume {path}"
    )
