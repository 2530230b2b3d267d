"""The process of a link between two network namespaces: forwards IPv4 packets, with delay and loss.

    python -m tests.fakes.network_link

consumes   packets from the TUN device of each namespace, commands (JSON lines) on stdin
waits for  a packet, a command, or the time at which the first delayed packet is due
ends       when stdin is closed, or when its parent dies

It needs no kernel module for emulation (netem). The namespaces have no names: they exist as long as
a process holds them, so nothing remains when the processes of a test are killed. On stdout, the
first line has the descriptors of the namespaces, and each further one answers a command with the
counters of the link.
"""

import ctypes
import fcntl
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field

from tests.fakes.network_hosts import ADDRESSES, DEVICE, PREFIX_BITS, LinkCounts, LinkSettings

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MAX_PACKET_BYTES = 65536
MAX_QUEUED = 10_000
"""Packets in flight in each direction; further ones are dropped, as by a full router."""
OWN_NAMESPACE = "/proc/thread-self/ns/net"

_libc = ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: int) -> None:
    """Calls a function of libc. Raises OSError."""
    if getattr(_libc, function)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


def make_host(address: str) -> tuple[int, int]:
    """Makes a network namespace with this address; returns its descriptor and that of its TUN
    device. This process is in the namespace afterwards. Raises OSError or CalledProcessError."""
    _call("unshare", CLONE_NEWNET)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    for command in (
        "link set lo up",
        f"addr add {address}/{PREFIX_BITS} dev {DEVICE}",
        f"link set {DEVICE} up",
    ):
        subprocess.run(["ip", *command.split()], check=True, stderr=subprocess.PIPE, text=True)
    return os.open(OWN_NAMESPACE, os.O_RDONLY), tun


@dataclass(kw_only=True)
class Forwarder:
    """Decides which packets arrive, and when. It reads no packet itself."""

    settings: LinkSettings = field(default_factory=LinkSettings)
    counts: LinkCounts = field(default_factory=LinkCounts)
    _random: random.Random = field(default_factory=random.Random)
    _in_flight: deque[tuple[float, int, bytes]] = field(default_factory=deque)
    """When each packet is due, the descriptor to write it to, and its bytes; in the order in which
    they were sent."""

    def change(self, settings: LinkSettings) -> None:
        self._random.seed(settings.seed)
        self.settings = settings
        if settings.is_cut:
            self.counts.cut += len(self._in_flight)
            self._in_flight.clear()

    def accept(self, packet: bytes, target: int, now_s: float) -> None:
        """Takes a packet that was sent to the descriptor `target`."""
        if packet[0] >> 4 != 4:  # IPv6 announces itself on every device
            return
        if self.settings.is_cut:
            self.counts.cut += 1
        elif self._random.random() < self.settings.loss or len(self._in_flight) > MAX_QUEUED:
            self.counts.lost += 1
        else:
            self._in_flight.append((now_s + self.settings.delay_s, target, packet))

    def due(self, now_s: float) -> list[tuple[int, bytes]]:
        """The packets that arrive now, with the descriptor to write each one to."""
        arrived = []
        while self._in_flight and self._in_flight[0][0] <= now_s:
            _, target, packet = self._in_flight.popleft()
            arrived.append((target, packet))
        self.counts.delivered += len(arrived)
        return arrived

    def wait_ms(self, now_s: float) -> float | None:
        """Time until the next packet is due; None if there is none."""
        if not self._in_flight:
            return None
        return max(0.0, self._in_flight[0][0] - now_s) * 1000.0


def forward(first: int, second: int) -> None:
    """Forwards packets between two TUN devices until stdin is closed."""
    forwarder = Forwarder()
    targets = {first: second, second: first}
    poll = select.poll()
    for descriptor in (*targets, sys.stdin.fileno()):
        poll.register(descriptor, select.POLLIN)
    while True:
        events = poll.poll(forwarder.wait_ms(time.monotonic()))
        for descriptor, _ in events:
            if descriptor in targets:
                _accept_all(forwarder, descriptor, targets[descriptor])
            elif line := sys.stdin.readline():  # one command at a time: each one is answered
                forwarder.change(LinkSettings(**json.loads(line)))
                print(json.dumps(vars(forwarder.counts)), flush=True)
            else:
                return
        for target, packet in forwarder.due(time.monotonic()):
            try:
                os.write(target, packet)
            except BlockingIOError:
                forwarder.counts.lost += 1


def _accept_all(forwarder: Forwarder, source: int, target: int) -> None:
    while True:
        try:
            packet = os.read(source, MAX_PACKET_BYTES)
        except BlockingIOError:
            return
        forwarder.accept(packet, target, time.monotonic())


def main() -> None:
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    own = os.open(OWN_NAMESPACE, os.O_RDONLY)
    try:
        hosts = [make_host(address) for address in ADDRESSES]
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)}: {error.stderr.strip()}")
    except OSError as error:
        sys.exit(str(error))
    _call("setns", own, CLONE_NEWNET)
    print(json.dumps([namespace for namespace, _ in hosts]), flush=True)
    forward(*(tun for _, tun in hosts))


if __name__ == "__main__":
    main()
