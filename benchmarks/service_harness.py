"""The buffer service in a separate process, started as in a run, for benchmarks."""

import json
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import QUICKSTART, ROOT
from benchmarks.service_peers import Keys
from benchmarks.service_roles import GROUP_SIZE, GROUPS_A_BATCH, TASK
from speed_async.config.load import build_config
from speed_async.config.schema import Config

START_S = 60.0
FOREVER = 10**9


def make_curve_keys(folder: Path) -> Keys | None:
    """Create keys as `speed-async keys` does. None if this release has no CURVE support."""
    try:
        from speed_async.transport.curve import load_client_keys
        from speed_async.transport.key_making import make_keys
    except ImportError:
        return None
    if not folder.exists():
        make_keys(folder)
    keys = load_client_keys(folder)
    return Keys(
        folder=folder,
        server_public=keys.server_public,
        public=keys.public,
        secret=keys.secret,
    )


def service_config(
    *,
    durability: str = "none",
    credits: int = 64,
    capacity_groups: int = 1024,
    group_size: int = GROUP_SIZE,
    keys: Keys | None = None,
    status_interval_s: float = 0.5,
) -> Config:
    """A run without gate, staleness limit or end, so that only the service limits the speed."""
    cluster: dict[str, object] = {"stall_timeout_s": float(FOREVER), "actors": 1}
    if keys is not None:
        cluster |= {"security": "curve", "keys": str(keys.folder)}
    tree: dict[str, dict[str, object]] = {
        "run": {"updates": FOREVER},
        "model": {"path": str(QUICKSTART.parent / "model"), "context_length": 1 << 20},
        "actors": {"max_new_tokens": 1 << 16},
        "task": TASK,
        "gate": {"mode": "off", "n_init": group_size, "n_cont": 0},
        "learner": {"groups_per_update": GROUPS_A_BATCH},
        "buffer": {
            "capacity_groups": capacity_groups,
            "capacity_bytes": 8 * 1024**3,
            "credits": credits,
            "max_staleness": FOREVER,
            "durability": durability,
        },
        "evaluate": {"every": 0},
        "cluster": cluster,
        "observe": {"status_interval_s": status_interval_s},
    }
    return build_config({"algorithm": "rloo", **tree})


@dataclass(frozen=True, kw_only=True)
class Running:
    process: subprocess.Popen[str]
    port: int
    feed_port: int
    run_folder: Path


@contextmanager
def service(config: Config, *, profile: Path | None = None) -> Iterator[Running]:
    """Run the buffer service in its own process and run folder; both are removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="service-") as folder:
        settings = Path(folder) / "settings.json"
        settings.write_text(config.model_dump_json())
        command = [sys.executable, "-m", "benchmarks.service_process", settings, folder]
        process = subprocess.Popen(
            [*map(str, command), *([str(profile)] if profile else [])],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], START_S)
            ready_message = json.loads(process.stdout.readline()) if ready else {}
            if "port" not in ready_message:
                raise RuntimeError("the service did not start")
            yield Running(
                process=process,
                port=ready_message["port"],
                feed_port=ready_message["feed_port"],
                run_folder=Path(folder),
            )
        finally:
            if profile is not None:
                process.send_signal(signal.SIGUSR1)
                process.wait(START_S)
            process.kill()
            process.wait()
