"""Layout and file permissions of the folder made by `speed-async keys`."""

import stat
from pathlib import Path

from speed_async.errors import ConfigError, NotAvailableHere

SERVER_PUBLIC = "server.key"
SERVER_SECRET = "server.key_secret"
CLIENT_SECRET = "client.key_secret"
"""Key pair of a client. Its public key is also in `ALLOWED` of the service."""
ALLOWED = "allowed"
"""Public keys of allowed clients, one file each; read again whenever the folder changes."""
CLIENTS = "clients"
"""Folders of additional clients, each to be copied to its machine."""


def check_client_files(folder: Path) -> None:
    """Check the files that every role needs: the service's public key and a key pair.

    Raises ConfigError (`cluster.keys`).
    """
    if not folder.is_dir():
        remedy = "no such folder; create it with `speed-async keys FOLDER`"
        raise NotAvailableHere("cluster.keys", str(folder), remedy)
    for name in (SERVER_PUBLIC, CLIENT_SECRET):
        if not (folder / name).is_file():
            remedy = f"it has no {name}; create a complete folder with `speed-async keys`"
            raise wrong_keys(folder, remedy)
    check_hidden(folder, folder / CLIENT_SECRET)
    for path in (folder, folder / SERVER_PUBLIC):
        _check_not_writable(folder, path)


def check_server_files(folder: Path) -> None:
    """Check the additional files of the service. Raises ConfigError (`cluster.keys`)."""
    secret, allowed = folder / SERVER_SECRET, folder / ALLOWED
    if not secret.is_file():
        remedy = (
            f"it has no {SERVER_SECRET}, so the service cannot run (is it a client folder?); on "
            "the node of rank 0 set the folder made by `speed-async keys`"
        )
        raise wrong_keys(folder, remedy)
    check_hidden(folder, secret)
    if not allowed.is_dir():
        raise wrong_keys(folder, f"it has no folder {ALLOWED} with the public keys of clients")
    for path in (folder, allowed, *allowed.glob("*.key")):
        _check_not_writable(folder, path)


def check_hidden(folder: Path, secret: Path) -> None:
    """Raises ConfigError if users other than the owner can read or write a secret."""
    mode = stat.S_IMODE(secret.stat().st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        problem = f"{secret} is a secret key and accessible to other users (mode {mode:04o})"
        raise wrong_keys(folder, f"{problem}; chmod 600 {secret}")


def _check_not_writable(folder: Path, path: Path) -> None:
    """Raises ConfigError if other users can write to `path` and so add keys."""
    if path.exists() and path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        remedy = f"{path} is writable by other users, who could add keys; chmod go-w {path}"
        raise wrong_keys(folder, remedy)


def wrong_keys(folder: Path, remedy: str) -> ConfigError:
    return ConfigError("cluster.keys", str(folder), remedy)
