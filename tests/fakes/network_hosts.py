"""Two hosts on this machine: network namespaces joined by a link with delay, loss and cuts.

Both see the same disk. All traffic stays within the two namespaces. The link is a process of its
own (network_link.py), which says what its loop consumes and when it ends.
"""

import contextlib
import ctypes
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tests.fakes.paths import REPOSITORY

ADDRESSES = ("192.0.2.1", "192.0.2.2")
"""Of the two hosts (a range for documentation; nothing outside the namespaces has a route)."""
PREFIX_BITS = 24
DEVICE = "wan0"
"""Network device of each host."""
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, kw_only=True)
class LinkSettings:
    delay_s: float = 0.0
    """One way, so a round trip takes twice as long."""
    loss: float = 0.0
    """Share of packets that are lost, in each direction."""
    is_cut: bool = False
    """Whether all packets are lost, also those on their way."""
    seed: int = 0
    """Of the losses; every change of the settings begins with it again."""


@dataclass(kw_only=True)
class LinkCounts:
    """IPv4 packets of both directions since the start."""

    delivered: int = 0
    lost: int = 0
    cut: int = 0


@dataclass(frozen=True, kw_only=True)
class Host:
    """A network namespace, open in this process."""

    address: str
    namespace: int
    """Descriptor."""

    @property
    def enter(self) -> list[str]:
        """Prefix of a command line that runs on this host, and is killed when this process dies.
        The process id stays the same."""
        namespace = f"/proc/{os.getpid()}/fd/{self.namespace}"
        return ["nsenter", f"--net={namespace}", "setpriv", "--pdeathsig", "KILL"]

    def enter_thread(self) -> None:
        """From now on, what the current thread opens is on this host; other threads are not
        affected."""
        entered = ctypes.CDLL(None, use_errno=True).setns(self.namespace, CLONE_NEWNET)
        assert entered == 0, os.strerror(ctypes.get_errno())

    def socket(self, kind: socket.SocketKind) -> socket.socket:
        """A socket of this process on this host."""

        def make() -> socket.socket:
            self.enter_thread()
            return socket.socket(socket.AF_INET, kind)

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(make).result()

    def free_port(self) -> int:
        with self.socket(socket.SOCK_STREAM) as probe:
            probe.bind((self.address, 0))
            return probe.getsockname()[1]

    def processes(self) -> list[int]:
        """Ids of all processes on this host."""
        own = os.fstat(self.namespace)
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it has ended
                    if os.path.samestat((entry / "ns" / "net").stat(), own):
                        found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """Kill all processes, also those that are being started."""
        while left := self.processes():
            for process_id in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)


class Hosts:
    """Two hosts and their link."""

    def __init__(self, link: subprocess.Popen[str], first: Host, second: Host) -> None:
        self.first = first
        self.second = second
        self._link = link
        self._settings = LinkSettings()

    @property
    def link_process(self) -> int:
        """Process id of the link."""
        return self._link.pid

    def set_link(self, *, delay_s: float = 0.0, loss: float = 0.0) -> LinkCounts:
        return self._change(replace(self._settings, delay_s=delay_s, loss=loss))

    def cut(self) -> LinkCounts:
        """From now on nothing arrives, and neither side is told."""
        return self._change(replace(self._settings, is_cut=True))

    def heal(self) -> LinkCounts:
        return self._change(replace(self._settings, is_cut=False))

    def counts(self) -> LinkCounts:
        return self._change(self._settings)

    def _change(self, settings: LinkSettings) -> LinkCounts:
        assert self._link.stdin is not None and self._link.stdout is not None
        self._link.stdin.write(json.dumps(vars(settings)) + "\n")
        self._link.stdin.flush()
        self._settings = settings
        return LinkCounts(**json.loads(self._link.stdout.readline()))


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts whose link has neither delay nor loss. All their processes are killed at exit.

    Raises OSError if they cannot be made.
    """
    link = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.network_link"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    with link, contextlib.ExitStack() as stack:
        assert link.stdin is not None and link.stdout is not None and link.stderr is not None
        first_line = link.stdout.readline()
        if not first_line:
            raise OSError(link.stderr.read().strip().rpartition("\n")[2])
        hosts = []
        for address, descriptor in zip(ADDRESSES, json.loads(first_line), strict=True):
            namespace = os.open(f"/proc/{link.pid}/fd/{descriptor}", os.O_RDONLY)
            stack.callback(os.close, namespace)
            host = Host(address=address, namespace=namespace)
            stack.callback(host.kill)
            hosts.append(host)
        stack.callback(link.kill)
        yield Hosts(link, *hosts)


@functools.cache
def obstacle() -> str:
    """Why two hosts cannot be made on this machine; empty if they can."""
    if missing := [name for name in ("nsenter", "setpriv", "ip") if shutil.which(name) is None]:
        return f"needs the command {missing[0]}"
    try:
        with two_hosts():
            return ""
    except OSError as error:
        return f"cannot make network namespaces with a TUN device ({error})"
