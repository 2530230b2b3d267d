"""Which connection, of which key, each peer's name belongs to: nobody else can speak under it.

A peer's routing identity is its name and a token that only its own link knows, so nobody else can
take over its connection. The name belongs to the first link that used it. Another link gets the
name when the first one has no connection any more, and only if it has the same CURVE key. Without
CURVE all peers count as one key.
"""

import re
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from speed_async.errors import ProtocolError
from speed_async.transport.transport import PeerName

MAX_NAMES_A_KEY = 1024
"""Past this, the name that its key has not used for longest is free again."""

_NAME = r"[A-Za-z0-9._:-]{1,100}"
_PEER_NAME = re.compile(_NAME)
_IDENTITY = re.compile(rf"({_NAME})/[0-9a-f]{{32}}")


def new_identity(name: PeerName) -> bytes:
    """Routing identity of a new link. Raises ProtocolError for a name the hub would refuse."""
    if not _PEER_NAME.fullmatch(name):
        raise _no_name(name)
    return f"{name}/{secrets.token_hex(16)}".encode()


def named_in(identity: bytes) -> PeerName:
    """The name that an identity claims. Raises ProtocolError."""
    text = identity.decode("ascii", "replace")
    found = _IDENTITY.fullmatch(text)
    if found is None:
        raise _no_name(text)
    return found[1]


def _no_name(text: str) -> ProtocolError:
    name = text.partition("/")[0]
    return ProtocolError(f"{name[:100]!r} is no peer name: use letters, digits and . _ : -")


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    identity: bytes
    key: str
    """Public key in Z85; "" without CURVE."""


class PeerNames:
    def __init__(self, is_connected: Callable[[bytes], bool]) -> None:
        """`is_connected`: whether the link of this identity has a connection now."""
        self._is_connected = is_connected
        self._names: dict[bytes, PeerName] = {}
        self._owners: dict[PeerName, Owner] = {}
        self._by_key: dict[str, OrderedDict[PeerName, None]] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._owners)

    def name(self, identity: bytes) -> PeerName | None:
        """The name that belongs to this link; marks it as used."""
        name = self._names.get(identity)
        if name is not None:
            self._by_key[self._owners[name].key].move_to_end(name)
        return name

    def owner(self, name: PeerName) -> Owner | None:
        return self._owners.get(name)

    def claim(self, identity: bytes, key: str) -> PeerName:
        """Give the link the name in its identity. Raises ProtocolError when that is another's."""
        name = named_in(identity)
        owner = self._owners.get(name)
        if owner is not None:
            if owner.key != key:
                raise ProtocolError(f"the name {name} belongs to another key")
            if self._is_connected(owner.identity):
                raise ProtocolError(f"the name {name} belongs to another connection, which is open")
            self._forget(name)
        names = self._by_key.setdefault(key, OrderedDict())
        if len(names) >= MAX_NAMES_A_KEY:
            self._forget(next(iter(names)))
        self._names[identity] = name
        self._owners[name] = Owner(identity=identity, key=key)
        names[name] = None
        return name

    def _forget(self, name: PeerName) -> None:
        owner = self._owners.pop(name)
        del self._names[owner.identity]
        del self._by_key[owner.key][name]
