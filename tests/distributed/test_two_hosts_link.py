"""The link between two hosts delays, loses and blocks packets as set."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from speed_async.transport import session as m
from speed_async.transport.transport import Delivery
from speed_async.transport.zeromq import open_hub, open_link
from tests.fakes.network_hosts import Hosts, obstacle, two_hosts
from tests.fakes.paths import REPOSITORY

DEADLINE_S = 60.0

pytestmark = pytest.mark.multinode


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if reason := obstacle():
        pytest.skip(reason)
    with two_hosts() as made:
        yield made


def connect(hosts: Hosts) -> tuple[socket.socket, socket.socket]:
    """A TCP connection: its sockets on the first and on the second host."""
    with hosts.first.socket(socket.SOCK_STREAM) as listener:
        listener.bind((hosts.first.address, 0))
        listener.listen()
        client = hosts.second.socket(socket.SOCK_STREAM)
        client.settimeout(DEADLINE_S)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        server.settimeout(DEADLINE_S)
        return server, client


def test_connection_takes_at_least_a_round_trip(hosts: Hosts) -> None:
    hosts.set_link(delay_s=0.05)
    began_s = time.monotonic()
    server, client = connect(hosts)
    with server, client:
        assert time.monotonic() - began_s >= 0.1
        began_s = time.monotonic()
        client.send(b"there")
        assert server.recv(5) == b"there"
        assert time.monotonic() - began_s >= 0.05


def test_lossy_link_loses_the_same_datagrams_in_each_run(hosts: Hosts) -> None:
    num_sent, lost = 200, []
    with (
        hosts.first.socket(socket.SOCK_DGRAM) as receiver,
        hosts.second.socket(socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((hosts.first.address, 0))
        receiver.settimeout(DEADLINE_S)
        for _ in range(2):
            before = hosts.set_link(loss=0.2)
            for number in range(num_sent):
                sender.sendto(number.to_bytes(), receiver.getsockname())
            hosts.set_link()
            sender.sendto(b"end", receiver.getsockname())
            received = list(iter(lambda: receiver.recv(8), b"end"))
            lost.append(set(range(num_sent)) - {datagram[0] for datagram in received})
            counts = hosts.counts()
            assert counts.lost - before.lost == len(lost[-1])
            assert counts.delivered - before.delivered == len(received) + 1
    assert lost[0] == lost[1]
    assert 20 < len(lost[0]) < 60


def test_cut_link_blocks_until_it_heals(hosts: Hosts) -> None:
    server, client = connect(hosts)
    with server, client:
        cut = hosts.cut().cut
        client.send(b"late")
        while hosts.counts().cut < cut + 3:  # the kernel sends it again
            time.sleep(0.01)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(4)
        server.settimeout(DEADLINE_S)
        hosts.heal()
        assert server.recv(4) == b"late"


@pytest.mark.slow
def test_peer_returns_soon_after_a_long_cut(hosts: Hosts) -> None:
    """The kernel alone would try to connect 15 and 31, or 19 and 35 s after the first attempt."""
    cut_s, soon_s = 21.0, 8.0

    async def exchange() -> None:
        hosts.first.enter_thread()
        hub = await open_hub(hosts.first.address, 0, silence_s=1.0)
        hosts.second.enter_thread()
        link = await open_link(hosts.first.address, hub.port, "actor-1.0", silence_s=1.0)
        await link.send(m.Ping(sent=1, received=0))
        name, _ = await hub.receive(DEADLINE_S)
        hosts.cut()
        async with asyncio.timeout(DEADLINE_S):
            while hub.offer(name, m.Ping(sent=1, received=0)) is not Delivery.GONE:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        await asyncio.sleep(cut_s)
        await link.send(m.Ping(sent=2, received=0))
        hosts.heal()
        assert await hub.receive(soon_s) == (name, m.Ping(sent=2, received=0))
        await link.close()
        await hub.close()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, exchange()).result()


def test_hosts_reach_only_each_other_and_end_with_their_processes() -> None:
    if reason := obstacle():
        pytest.skip(reason)
    with two_hosts() as hosts:
        with hosts.first.socket(socket.SOCK_DGRAM) as probe, pytest.raises(OSError):
            probe.connect(("198.51.100.1", 9))
        with socket.socket() as outside, pytest.raises(OSError):
            outside.bind((hosts.first.address, 0))
        command = [*hosts.second.enter, "sleep", "600"]
        sleeping = subprocess.Popen(command)
        while hosts.second.processes() != [sleeping.pid]:
            time.sleep(0.01)
        assert hosts.first.processes() == []
    assert sleeping.wait(DEADLINE_S) == -signal.SIGKILL


PARENT = """
import subprocess
from tests.fakes.network_hosts import two_hosts
with two_hosts() as hosts:
    sleeping = subprocess.Popen(
        [*hosts.second.enter, "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE
    )
    sleeping.stdout.readline()  # before it, `enter` may not yet have asked for the signal
    print(hosts.link_process, sleeping.pid, flush=True)
    input()
"""


def test_link_and_processes_end_when_their_parent_is_killed() -> None:
    if reason := obstacle():
        pytest.skip(reason)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with parent:
        assert parent.stdout is not None
        left = [Path(f"/proc/{one}/fd/0") for one in map(int, parent.stdout.readline().split())]
        assert all(path.exists() for path in left)
        parent.kill()
    ends_s = time.monotonic() + DEADLINE_S
    while any(path.exists() for path in left):
        assert time.monotonic() < ends_s
        time.sleep(0.01)
