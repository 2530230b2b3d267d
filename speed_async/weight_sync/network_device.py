"""The address and the network device of this machine on the route to another one."""

import fcntl
import socket
import struct
from contextlib import suppress

SIOCGIFADDR = 0x8915
"""Linux: reads the IPv4 address of a device."""

ANY_PORT = 9


def own_address(host: str) -> str:
    """This machine's address on the route to `host` (no packet is sent). Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(host, ANY_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def device_with(address: str) -> str | None:
    """Name of the device with this IPv4 address, on Linux; None if it is not found."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # a device without an IPv4 address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
