"""TCP ports: the text of an address, probing for a listener, and testing whether a port is free."""

import asyncio
import socket
import time
from urllib.parse import urlsplit

from speed_async.errors import SpeedAsyncError

POLL_S = 0.05


def address_at(host: str, port: int) -> str:
    """tcp://HOST:PORT, as `--join` and `console` accept it; an IPv6 address is in brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def host_and_port(address: str) -> tuple[str, int]:
    """Inverse of `address_at`; the scheme may be missing. Raises SpeedAsyncError."""
    malformed = SpeedAsyncError(
        f"'{address}' is neither the address of a run (tcp://HOST:PORT) nor a folder"
    )
    try:
        parts = urlsplit(address if "//" in address else f"tcp://{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise malformed from None
    if host is None or port is None:
        raise malformed
    return host, port


async def listens(host: str, port: int, *, timeout_s: float) -> bool:
    """Whether a process accepts connections at this address."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout_s)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def becomes_free(host: str, port: int, *, timeout_s: float) -> bool:
    """Whether this port can be bound now or within `timeout_s`: its owner may still be exiting."""
    ends_s = time.monotonic() + timeout_s
    while not _can_bind(host, port):
        if time.monotonic() >= ends_s:
            return False
        time.sleep(POLL_S)
    return True


def _can_bind(host: str, port: int) -> bool:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ZeroMQ does
            probe.bind(address)
    except OSError:
        return False
    return True
