"""The folder that `speed-async keys` makes: what lies where in it, and who may read that."""

import stat
from pathlib import Path

from speed_async.errors import ConfigError

SERVER_PUBLIC = "server.key"
SERVER_SECRET = "server.key_secret"
CLIENT_SECRET = "client.key_secret"
"""A client's own pair. Its public half is in the service's `ALLOWED` as well."""
ALLOWED = "allowed"
"""Public keys of all that may connect, a file each; read again whenever the folder changes."""
CLIENTS = "clients"
"""Folders for further clients, each to be carried to its machine."""


def check_client_files(folder: Path) -> None:
    """What every role needs: the service's public key and a pair of its own.

    Raises ConfigError about `cluster.keys`.
    """
    if not folder.is_dir():
        raise wrong_keys(folder, "no such folder; make it with `speed-async keys FOLDER`")
    for name in (SERVER_PUBLIC, CLIENT_SECRET):
        if not (folder / name).is_file():
            remedy = f"it has no {name}; `speed-async keys` makes whole folders of keys"
            raise wrong_keys(folder, remedy)
    check_hidden(folder, folder / CLIENT_SECRET)
    for place in (folder, folder / SERVER_PUBLIC):
        _check_own(folder, place)


def check_server_files(folder: Path) -> None:
    """What the service needs besides. Raises ConfigError about `cluster.keys`."""
    secret, allowed = folder / SERVER_SECRET, folder / ALLOWED
    if not secret.is_file():
        remedy = (
            f"it has no {SERVER_SECRET}, so no service can run here (a client's folder?); on the "
            "node of rank 0 give the folder that `speed-async keys` made"
        )
        raise wrong_keys(folder, remedy)
    check_hidden(folder, secret)
    if not allowed.is_dir():
        raise wrong_keys(folder, f"it has no folder {ALLOWED} of the public keys that may connect")
    for place in (folder, allowed, *allowed.glob("*.key")):
        _check_own(folder, place)


def check_hidden(folder: Path, secret: Path) -> None:
    """Raises ConfigError when anyone but its owner may read or write a secret."""
    mode = stat.S_IMODE(secret.stat().st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        remedy = f"others may read {secret} (mode {mode:04o}), a secret key; chmod 600 {secret}"
        raise wrong_keys(folder, remedy)


def _check_own(folder: Path, place: Path) -> None:
    """Raises ConfigError when others may replace what is read here, and so let anyone in."""
    if place.exists() and place.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        remedy = f"others may write to {place}, and so let anyone in; chmod go-w {place}"
        raise wrong_keys(folder, remedy)


def wrong_keys(folder: Path, remedy: str) -> ConfigError:
    return ConfigError("cluster.keys", str(folder), remedy)
