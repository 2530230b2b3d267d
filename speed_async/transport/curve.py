"""CURVE: sockets that are encrypted, and open to the holders of allowed keys alone.

The service's sockets ask an authenticator (ZAP) of their own context about every key that connects.
It runs in a thread, so a busy event loop keeps nobody waiting at the door. Where there is no
authenticator nobody gets in: libzmq would let everybody in, unless the domain is enforced.
"""

import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.auth import load_certificate
from zmq.auth.thread import ThreadAuthenticator

from speed_async.config import key_folder as names
from speed_async.config.schema import ClusterConfig
from speed_async.errors import ConfigError

ZAP_DOMAIN = "speed_async"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientKeys:
    """Of one who connects. Keys are Z85 text, 40 bytes each."""

    server_public: bytes
    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerKeys:
    """Of the service, for the sockets that it binds."""

    public: bytes
    secret: bytes = field(repr=False)
    allowed: Path
    """Folder of the public keys that may connect."""


Keys = ClientKeys | ServerKeys


def client_keys(cluster: ClusterConfig) -> ClientKeys | None:
    """What a role connects with; None where sockets are plain. Raises ConfigError."""
    return load_client_keys(Path(cluster.keys or "")) if cluster.speaks_curve else None


def server_keys(cluster: ClusterConfig) -> ServerKeys | None:
    """What the service binds with; None where sockets are plain. Raises ConfigError."""
    return load_server_keys(Path(cluster.keys or "")) if cluster.speaks_curve else None


def load_client_keys(folder: Path) -> ClientKeys:
    """From a folder of `speed-async keys`. Raises ConfigError about `cluster.keys`."""
    names.check_client_files(folder)
    public, secret = _pair(folder, names.CLIENT_SECRET)
    server_public, _ = _certificate(folder, names.SERVER_PUBLIC)
    return ClientKeys(server_public=server_public, public=public, secret=secret)


def load_server_keys(folder: Path) -> ServerKeys:
    """From a folder of `speed-async keys`. Raises ConfigError about `cluster.keys`."""
    names.check_server_files(folder)
    public, secret = _pair(folder, names.SERVER_SECRET)
    return ServerKeys(public=public, secret=secret, allowed=folder / names.ALLOWED)


class AllowList:
    """Whose key may connect: a public key in any `*.key` file of the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, tuple[int, ...]] = {}
        self._keys: frozenset[bytes] = frozenset()

    def callback(self, domain: str, key: bytes) -> bool:
        """The authenticator's question, in its thread. Must not raise: that would end it."""
        try:
            # The folder's own time stands still when a file in it is written over.
            files = {path: facts for path in self._folder.glob("*.key") if (facts := _facts(path))}
            if files != self._files:
                self._keys = frozenset(filter(None, map(_public_key, files)))
                self._files = files
        except OSError:
            return False
        return key in self._keys


def secure(socket: zmq.Socket, keys: Keys | None) -> ThreadAuthenticator | None:
    """Have `socket` speak CURVE. Call before it binds or connects.

    Returns the authenticator of the socket's context, which has to be stopped before that ends.
    """
    if keys is None:
        return None
    socket.CURVE_PUBLICKEY, socket.CURVE_SECRETKEY = keys.public, keys.secret
    if isinstance(keys, ClientKeys):
        socket.CURVE_SERVERKEY = keys.server_public
        return None
    authenticator = ThreadAuthenticator(socket.context)
    allow_list = AllowList(keys.allowed)
    authenticator.configure_curve_callback(domain=ZAP_DOMAIN, credentials_provider=allow_list)
    authenticator.start()
    socket.CURVE_SERVER = 1
    socket.ZAP_DOMAIN = ZAP_DOMAIN.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    return authenticator


def why_silent(keys: Keys | None) -> str:
    """What may be wrong with keys when nobody ever answered."""
    if keys is None:
        return "if it has keys (cluster.keys), it is silent to all who come without one"
    return (
        "it is silent to a key that is not in its folder allowed/, to the wrong server.key, and if "
        "it has no keys itself"
    )


def _pair(folder: Path, name: str) -> tuple[bytes, bytes]:
    public, secret = _certificate(folder, name)
    try:
        fits = secret is not None and zmq.curve_public(secret) == public
    except (ValueError, zmq.ZMQError):
        fits = False
    if secret is None or not fits:
        raise names.wrong_keys(folder, f"{name} holds no pair of keys; make new ones")
    return public, secret


def _certificate(folder: Path, name: str) -> tuple[bytes, bytes | None]:
    try:
        public, secret = load_certificate(folder / name)
    except (OSError, ValueError, IndexError) as error:
        raise names.wrong_keys(folder, f"{name} cannot be read ({error})") from None
    if len(public) != 40:
        raise names.wrong_keys(folder, f"the public key in {name} is not of 40 characters")
    return public, secret


def _facts(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does; None for what is no file, which a reader may wait at."""
    try:
        found = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _public_key(path: Path) -> bytes | None:
    """None for a file that is no certificate: it lets nobody in, and keeps nobody else out."""
    try:
        return _certificate(path.parent, path.name)[0]
    except ConfigError:
        return None
