"""Checks of this machine: disk, ports, keys and optional libraries."""

import importlib.util
import os
import shutil
from pathlib import Path

from speed_async.config.key_folder import check_server_files
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, NotAvailableHere
from speed_async.launcher.ports import becomes_free
from speed_async.launcher.preflight.findings import Findings

PORT_GRACE_S = 5.0
"""For a resumed run: its previous attempt may still be exiting."""


def check_libraries(config: Config, findings: Findings) -> None:
    if config.observe.wandb and importlib.util.find_spec("wandb") is None:
        remedy = "wandb is not installed here: pip install wandb, or set false"
        findings.errors.append(NotAvailableHere("observe.wandb", True, remedy))


def check_ports(config: Config, findings: Findings, *, resume: bool = False) -> None:
    cluster = config.cluster
    if not becomes_free(cluster.host, 0, timeout_s=0.0):
        findings.errors.append(
            NotAvailableHere(
                "cluster.host",
                cluster.host,
                "the service cannot bind to it: it is not an address of this machine; set the "
                "address at which other machines reach this one",
            )
        )
        return
    names = ["service_port", "feed_port", *(["learner_port"] if cluster.learners > 1 else [])]
    for name in names:
        port = getattr(cluster, name)
        if not port or becomes_free(cluster.host, port, timeout_s=PORT_GRACE_S if resume else 0.0):
            continue
        findings.errors.append(
            ConfigError(
                f"cluster.{name}",
                port,
                f"it is in use or not permitted at {cluster.host}; choose another, or 0 for any "
                "free port",
            )
        )


def check_keys(config: Config, findings: Findings) -> None:
    """Check the server's key files (config/checks checks the files of all roles)."""
    keys = config.cluster.keys
    if keys is None or not config.cluster.uses_curve or not Path(keys).is_dir():
        return
    try:
        check_server_files(Path(keys))
    except ConfigError as error:
        findings.errors.append(error)


def check_folders(config: Config, findings: Findings) -> Path | None:
    """Return the nearest existing parent of the run folder, or None if the run folder cannot be
    created."""
    fields = [("observe.trace", config.observe.trace), ("run.folder", config.run.folder)]
    parent: Path | None = None
    for field, folder in fields:
        if folder is None:
            continue
        wanted = Path(folder).expanduser().resolve()
        parent = nearest_existing(wanted)
        if not parent.is_dir():
            fault = f"cannot be created: {parent} is a file"
        elif not os.access(parent, os.W_OK | os.X_OK):
            fault = f"cannot be created: {parent} is not writable; choose another folder"
        else:
            continue
        findings.errors.append(ConfigError(field, folder, fault))
        parent = None
    return parent


def nearest_existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists. `path` is absolute."""
    return next(each for each in (path, *path.parents) if each.exists())


def check_disk(
    config: Config, findings: Findings, *, parent: Path, checkpoint_bytes: int
) -> list[str]:
    """Compare free space with the size of checkpoints. `parent`: folder that will contain the run
    folder."""
    free = shutil.disk_usage(parent).free
    kept = config.learner.keep_last + 1
    if free < checkpoint_bytes:
        findings.errors.append(
            ConfigError(
                "run.folder",
                config.run.folder,
                f"{size(free)} are free, and one checkpoint takes about "
                f"{size(checkpoint_bytes)}; choose a folder on another disk",
            )
        )
    elif free < kept * checkpoint_bytes:
        findings.warnings.append(
            f"run.folder = {config.run.folder!r}: {size(free)} are free, and up to {kept} "
            f"checkpoints (learner.keep_last = {config.learner.keep_last}, plus one being written) "
            f"take about {size(kept * checkpoint_bytes)}"
        )
    return [f"{size(free)} free at {parent}; a checkpoint takes about {size(checkpoint_bytes)}"]


def size(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
