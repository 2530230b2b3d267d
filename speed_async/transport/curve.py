"""CURVE: encrypted sockets that accept only clients with allowed keys.

Each server socket checks every connecting key with a ZAP authenticator in its own context. The
authenticator runs in a thread, so a busy event loop does not delay handshakes. Without an
authenticator all connections are refused: the ZAP domain is enforced, because libzmq accepts every
client otherwise.
"""

import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from speed_async.config import key_folder as names
from speed_async.config.sections.cluster import ClusterConfig
from speed_async.errors import ConfigError

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

ZAP_DOMAIN = "speed_async"

_load_certificate = cast("Callable[[Path], tuple[bytes, bytes | None]]", zmq.auth.load_certificate)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientKeys:
    """Keys of a connecting client. Each key is Z85 text of 40 bytes."""

    server_public: bytes
    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerKeys:
    """Keys of the service, for the sockets that it binds."""

    public: bytes
    secret: bytes = field(repr=False)
    allowed: Path
    """Folder with the public keys of allowed clients."""


Keys = ClientKeys | ServerKeys


def client_keys(cluster: ClusterConfig) -> ClientKeys | None:
    """Load the keys that a role connects with; None without CURVE. Raises ConfigError."""
    return load_client_keys(Path(cluster.keys or "")) if cluster.uses_curve else None


def server_keys(cluster: ClusterConfig) -> ServerKeys | None:
    """Load the keys that the service binds with; None without CURVE. Raises ConfigError."""
    return load_server_keys(Path(cluster.keys or "")) if cluster.uses_curve else None


def load_client_keys(folder: Path) -> ClientKeys:
    """Load keys from a folder made by `speed-async keys`. Raises ConfigError (`cluster.keys`)."""
    names.check_client_files(folder)
    public, secret = _pair(folder, names.CLIENT_SECRET)
    server_public, _ = _certificate(folder, names.SERVER_PUBLIC)
    return ClientKeys(server_public=server_public, public=public, secret=secret)


def load_server_keys(folder: Path) -> ServerKeys:
    """Load keys from a folder made by `speed-async keys`. Raises ConfigError (`cluster.keys`)."""
    names.check_server_files(folder)
    public, secret = _pair(folder, names.SERVER_SECRET)
    return ServerKeys(public=public, secret=secret, allowed=folder / names.ALLOWED)


class AllowList:
    """Public keys that may connect: those in the `*.key` files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, tuple[int, ...]] = {}
        self._keys: frozenset[bytes] = frozenset()

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by the authenticator in its thread. An exception would stop the thread."""
        try:
            # Overwriting a file does not change the modification time of its folder.
            files = {
                path: signature
                for path in self._folder.glob("*.key")
                if (signature := _signature(path))
            }
            if files != self._files:
                self._keys = frozenset(filter(None, map(_public_key, files)))
                self._files = files
        except OSError:
            return False
        return key in self._keys


def configure_curve(socket: Socket, keys: Keys | None) -> ThreadAuthenticator | None:
    """Enable CURVE on `socket`. Call before it binds or connects.

    Returns the authenticator of the socket's context, to be stopped before the context terminates.
    """
    if keys is None:
        return None
    socket.CURVE_PUBLICKEY, socket.CURVE_SECRETKEY = keys.public, keys.secret
    if isinstance(keys, ClientKeys):
        socket.CURVE_SERVERKEY = keys.server_public
        return None
    authenticator = ThreadAuthenticator(cast("Context", socket.context))
    allow_list = AllowList(keys.allowed)
    authenticator.configure_curve_callback(domain=ZAP_DOMAIN, credentials_provider=allow_list)
    authenticator.start()
    socket.CURVE_SERVER = 1
    socket.ZAP_DOMAIN = ZAP_DOMAIN.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    return authenticator


def silence_hint(keys: Keys | None) -> str:
    """Hint about keys for the error message when a peer never responded."""
    if keys is None:
        return "if it requires keys (cluster.keys), it ignores clients without a key"
    return (
        "it ignores a key that is not in its folder allowed/, a wrong server.key, and every key if "
        "it runs without keys"
    )


def _pair(folder: Path, name: str) -> tuple[bytes, bytes]:
    public, secret = _certificate(folder, name)
    try:
        is_pair = secret is not None and zmq.curve_public(secret) == public
    except (ValueError, zmq.ZMQError):
        is_pair = False
    if secret is None or not is_pair:
        raise names.wrong_keys(folder, f"{name} does not contain a valid key pair; make new keys")
    return public, secret


def _certificate(folder: Path, name: str) -> tuple[bytes, bytes | None]:
    try:
        public, secret = _load_certificate(folder / name)
    except (OSError, ValueError, IndexError) as error:
        raise names.wrong_keys(folder, f"{name} cannot be read ({error})") from None
    if len(public) != 40:
        raise names.wrong_keys(folder, f"the public key in {name} does not have 40 characters")
    return public, secret


def _signature(path: Path) -> tuple[int, ...] | None:
    """Values that change with the file; None for other types, such as a FIFO that blocks."""
    try:
        found = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _public_key(path: Path) -> bytes | None:
    """Load a public key; None for an invalid file, which does not affect the other keys."""
    try:
        return _certificate(path.parent, path.name)[0]
    except ConfigError:
        return None
