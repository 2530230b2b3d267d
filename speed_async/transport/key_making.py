"""Create keys: one folder for the service of a run, and one for each additional client."""

import os
import re
from pathlib import Path

import zmq

from speed_async.config import key_folder as names
from speed_async.errors import SpeedAsyncError

CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
OWN_CLIENT = "client"
"""Name of the key pair shared by the roles of the run."""


def make_keys(folder: Path) -> None:
    """Create a key folder: the service's key pair, a pair for the roles, and the allow list.

    Raises SpeedAsyncError if the folder exists: existing keys are never overwritten.
    """
    if folder.exists():
        remedy = "add a client with --client NAME, or choose another folder"
        raise SpeedAsyncError(f"{folder} exists; keys are never overwritten: {remedy}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
        for inner in (names.ALLOWED, names.CLIENTS):
            (folder / inner).mkdir(mode=0o700)
        public, secret = zmq.curve_keypair()
        _write(folder / names.SERVER_SECRET, public, secret)
        _write(folder / names.SERVER_PUBLIC, public)
        _add_client(folder, folder, OWN_CLIENT)
    except OSError as error:
        raise SpeedAsyncError(f"cannot create keys in {folder}: {error.strerror}") from None


def add_client(folder: Path, name: str) -> Path:
    """Allow one more client. Returns its folder, which holds everything that its machine needs.

    Raises SpeedAsyncError for a name that is taken or invalid, and for a folder without keys.
    """
    if not CLIENT_NAME.fullmatch(name):
        raise SpeedAsyncError(f"'{name}' is not a valid client name: use letters, digits and . _ -")
    if not (folder / names.SERVER_SECRET).is_file():
        remedy = f"create it with `speed-async keys {folder}`"
        raise SpeedAsyncError(f"{folder} is not a folder of service keys: {remedy}")
    if (folder / names.ALLOWED / f"{name}.key").exists():
        raise SpeedAsyncError(f"client '{name}' exists in {folder}; choose another name")
    client_folder = folder / names.CLIENTS / name
    try:
        client_folder.mkdir(mode=0o700, parents=True)
        (client_folder / names.SERVER_PUBLIC).write_bytes(
            (folder / names.SERVER_PUBLIC).read_bytes()
        )
        _add_client(folder, client_folder, name)
    except OSError as error:
        raise SpeedAsyncError(f"cannot add a client in {client_folder}: {error.strerror}") from None
    return client_folder


def _add_client(folder: Path, client_folder: Path, name: str) -> None:
    public, secret = zmq.curve_keypair()
    _write(client_folder / names.CLIENT_SECRET, public, secret)
    # A running service reads `*.key` files as they appear, so the file is renamed when complete.
    temporary = folder / names.ALLOWED / f"{name}.new"
    _write(temporary, public)
    temporary.rename(temporary.with_suffix(".key"))


def _write(path: Path, public: bytes, secret: bytes | None = None) -> None:
    """Write a certificate in ZeroMQ format; only the owner can read one with a secret key."""
    lines = ["metadata", "curve", f'    public-key = "{public.decode()}"']
    if secret is not None:
        lines.append(f'    secret-key = "{secret.decode()}"')
    mode = 0o644 if secret is None else 0o600
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(descriptor)
