"""Making keys: the folder of a run's service, and one folder more for each further client."""

import os
import re
from pathlib import Path

import zmq

from speed_async.config import key_folder as names
from speed_async.errors import SpeedAsyncError

CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
OWN_CLIENT = "client"
"""The pair that the run's own roles share."""


def make_keys(folder: Path) -> None:
    """A folder for a run: the service's pair, a pair for its roles, and who is allowed.

    Raises SpeedAsyncError when anything is there already: keys in use are never overwritten.
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
        raise SpeedAsyncError(f"keys cannot be made at {folder}: {error.strerror}") from None


def add_client(folder: Path, name: str) -> Path:
    """Allow one client more. Returns its folder, all that its machine needs.

    Raises SpeedAsyncError for a name that is taken or unfit, and for a folder without keys.
    """
    if not CLIENT_NAME.fullmatch(name):
        raise SpeedAsyncError(f"'{name}' is no name for a client: use letters, digits and . _ -")
    if not (folder / names.SERVER_SECRET).is_file():
        make = f"make it with `speed-async keys {folder}`"
        raise SpeedAsyncError(f"{folder} is no folder of a service's keys: {make}")
    if (folder / names.ALLOWED / f"{name}.key").exists():
        raise SpeedAsyncError(f"there is a client '{name}' in {folder}; choose another name")
    place = folder / names.CLIENTS / name
    try:
        place.mkdir(mode=0o700, parents=True)
        (place / names.SERVER_PUBLIC).write_bytes((folder / names.SERVER_PUBLIC).read_bytes())
        _add_client(folder, place, name)
    except OSError as error:
        raise SpeedAsyncError(f"a client cannot be added at {place}: {error.strerror}") from None
    return place


def _add_client(folder: Path, place: Path, name: str) -> None:
    public, secret = zmq.curve_keypair()
    _write(place / names.CLIENT_SECRET, public, secret)
    # A service at work reads the folder when a name appears in it, so the file is whole by then.
    unfinished = folder / names.ALLOWED / f"{name}.new"
    _write(unfinished, public)
    unfinished.rename(unfinished.with_suffix(".key"))


def _write(path: Path, public: bytes, secret: bytes | None = None) -> None:
    """A certificate in ZeroMQ's own form; one with a secret is its owner's alone."""
    lines = ["metadata", "curve", f'    public-key = "{public.decode()}"']
    if secret is not None:
        lines.append(f'    secret-key = "{secret.decode()}"')
    mode = 0o644 if secret is None else 0o600
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(descriptor)
