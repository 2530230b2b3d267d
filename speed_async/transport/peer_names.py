"""Ownership of peer names: each name belongs to one connection and one key.

The routing identity of a peer consists of its name and a secret token of its link, so no other peer
can take over its connection. The first link that uses a name owns it. Another link can claim the
name once the owner is disconnected, and only with the same CURVE key. Without CURVE all peers
count as one key.
"""

import re
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from speed_async.errors import ProtocolError
from speed_async.transport.transport import PeerName

MAX_NAMES_PER_KEY = 1024
"""Beyond this, the least recently used name of the key is released."""

_NAME = r"[A-Za-z0-9._:-]{1,100}"
_PEER_NAME = re.compile(_NAME)
_IDENTITY = re.compile(rf"({_NAME})/[0-9a-f]{{32}}")


def new_identity(name: PeerName) -> bytes:
    """Create the routing identity of a new link. Raises ProtocolError for an invalid name."""
    if not _PEER_NAME.fullmatch(name):
        raise _invalid_name(name)
    return f"{name}/{secrets.token_hex(16)}".encode()


def claimed_name(identity: bytes) -> PeerName:
    """The name that an identity claims. Raises ProtocolError if it is invalid."""
    text = identity.decode("ascii", "replace")
    found = _IDENTITY.fullmatch(text)
    if found is None:
        raise _invalid_name(text)
    return found[1]


def _invalid_name(text: str) -> ProtocolError:
    name = text.partition("/")[0]
    remedy = "use letters, digits and . _ : -"
    return ProtocolError(f"{name[:100]!r} is not a valid peer name: {remedy}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    identity: bytes
    key: str
    """Public key in Z85; "" without CURVE."""


class PeerNames:
    def __init__(self, is_connected: Callable[[bytes], bool]) -> None:
        """`is_connected` returns whether the link with this identity is connected."""
        self._is_connected = is_connected
        self._names: dict[bytes, PeerName] = {}
        self._owners: dict[PeerName, Owner] = {}
        self._by_key: dict[str, OrderedDict[PeerName, None]] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._owners)

    def name(self, identity: bytes) -> PeerName | None:
        """The name owned by this link. Marks it as recently used."""
        name = self._names.get(identity)
        if name is not None:
            self._by_key[self._owners[name].key].move_to_end(name)
        return name

    def owner(self, name: PeerName) -> Owner | None:
        return self._owners.get(name)

    def claim(self, identity: bytes, key: str) -> PeerName:
        """Assign the name in `identity`. Raises ProtocolError if another link owns it."""
        name = claimed_name(identity)
        owner = self._owners.get(name)
        if owner is not None:
            if owner.key != key:
                raise ProtocolError(f"the name {name} belongs to another key")
            if self._is_connected(owner.identity):
                raise ProtocolError(f"the name {name} belongs to another connection, which is open")
            self._release(name)
        names = self._by_key.setdefault(key, OrderedDict())
        if len(names) >= MAX_NAMES_PER_KEY:
            self._release(next(iter(names)))
        self._names[identity] = name
        self._owners[name] = Owner(identity=identity, key=key)
        names[name] = None
        return name

    def _release(self, name: PeerName) -> None:
        owner = self._owners.pop(name)
        del self._names[owner.identity]
        del self._by_key[owner.key][name]
