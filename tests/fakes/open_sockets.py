"""Reads the addresses at which the processes of a run listen from /proc."""

import ipaddress
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LISTEN = "0A"
POLL_S = 0.2


def children_of(process_id: int) -> list[int]:
    """Empty when the process has ended."""
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{process_id}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def descendants(process_id: int) -> list[int]:
    """This process and all its descendants."""
    found = [process_id]
    for one in found:
        found += children_of(one)
    return found


def listening(process_id: int) -> set[str]:
    """Addresses, without ports, at which a process accepts TCP connections."""
    inodes = set()
    for descriptor in Path(f"/proc/{process_id}/fd").iterdir():
        with suppress(OSError):
            inodes.add(descriptor.readlink().name.removeprefix("socket:[").rstrip("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{process_id}/net/{table}").read_text().splitlines()
        except FileNotFoundError:  # the process has ended
            continue
        for line in lines[1:]:
            _, local, _, state, *rest = line.split()
            if state == LISTEN and rest[5] in inodes:
                found.add(_address(local.partition(":")[0]))
    return found


@contextmanager
def watched(process_id: int) -> Iterator[dict[str, set[str]]]:
    """Collect the listening addresses of a run's processes by command while the context is open."""
    seen: dict[str, set[str]] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            for one in descendants(process_id):
                with suppress(OSError):
                    command = Path(f"/proc/{one}/cmdline").read_bytes().decode().split("\0")
                    seen.setdefault(" ".join(command[2:4]), set()).update(listening(one))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield seen
    finally:
        done.set()
        watching.join()


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _address(text: str) -> str:
    """Parse an address of /proc/net/tcp: 32-bit words in the byte order of the machine."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
