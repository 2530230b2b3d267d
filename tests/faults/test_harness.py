"""The drill's own components: the fault plan, the proxy, the disk and the process search."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.disk import LimitedFiles, SmallDisk, small_disk
from tests.faults.faults import KINDS, plan
from tests.faults.proxy import Proxy, is_listening
from tests.faults.targets import MARK, Targets

# --- the plan ----------------------------------------------------------------------------------


def test_a_seed_determines_the_plan_and_every_kind_occurs_once_before_any_repeats() -> None:
    faults = plan(7, 2 * len(KINDS))
    assert faults == plan(7, 2 * len(KINDS)) != plan(8, 2 * len(KINDS))
    assert {fault.kind for fault in faults[: len(KINDS)]} == set(KINDS)
    assert any(fault.overlaps for fault in faults)
    assert not faults[0].overlaps


# --- the proxy ---------------------------------------------------------------------------------


@contextmanager
def echo_proxy() -> Iterator[tuple[Proxy, socket.socket]]:
    """A proxy in front of an echo server, and a working connection through it."""
    command = [sys.executable, "-c", ECHO]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as echo:
        try:
            assert echo.stdout is not None
            with Proxy(int(echo.stdout.readline())) as proxy, connected(proxy) as client:
                assert echoes(client)
                yield proxy, client
        finally:
            echo.kill()


ECHO = """
import asyncio
async def echo(reader, writer):
    while chunk := await reader.read(1000):
        writer.write(chunk)
async def main():
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def connected(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10.0)


def echoes(client: socket.socket, timeout_s: float = 10.0) -> bool:
    client.settimeout(timeout_s)
    try:
        client.sendall(b"hello")
        return client.recv(5, socket.MSG_WAITALL) == b"hello"
    except OSError:
        return False


def test_a_cut_resets_open_connections_and_new_ones_work() -> None:
    with echo_proxy() as (proxy, client):
        proxy.cut()
        assert not echoes(client)
        with connected(proxy) as another:
            assert echoes(another)


def test_refused_links_close_at_once_until_restored() -> None:
    with echo_proxy() as (proxy, client):
        proxy.refuse()
        assert not echoes(client)
        with connected(proxy) as another:
            assert not echoes(another)
        proxy.restore()
        with connected(proxy) as another:
            assert echoes(another)


def test_a_stalled_link_keeps_every_byte() -> None:
    with echo_proxy() as (proxy, client):
        proxy.stall()
        assert not echoes(client, timeout_s=0.2)
        proxy.restore()
        client.settimeout(10.0)
        assert client.recv(5, socket.MSG_WAITALL) == b"hello"


def test_a_delay_adds_latency_in_both_directions_until_restored() -> None:
    with echo_proxy() as (proxy, client):
        proxy.delay(0.15)
        start_s = time.monotonic()
        assert echoes(client)
        assert time.monotonic() - start_s >= 0.3
        proxy.restore()
        start_s = time.monotonic()
        assert echoes(client)
        assert time.monotonic() - start_s < 0.3


def test_the_proxy_listens_only_while_its_target_listens() -> None:
    with socket.socket() as service:
        service.bind(("127.0.0.1", 0))
        with Proxy(service.getsockname()[1]) as proxy:
            wait_until(lambda: not is_listening(proxy.port))
            service.listen()
            wait_until(lambda: is_listening(proxy.port))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline_s


# --- the disk ----------------------------------------------------------------------------------


def test_a_full_disk_refuses_writes_until_it_is_freed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4 * 1024 * 1024) as disk:
        check_full_and_free(disk)
    assert not (tmp_path / "disk" / "file").exists() or isinstance(disk, LimitedFiles)


def test_a_file_size_limit_acts_like_a_full_disk(tmp_path: Path) -> None:
    check_full_and_free(LimitedFiles(tmp_path))


def check_full_and_free(disk: SmallDisk | LimitedFiles) -> None:
    """Checks a process that appends on request and reports the result."""
    command = [sys.executable, "-c", APPEND, str(disk.folder / "file")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as writer:
        stdin, stdout = writer.stdin, writer.stdout
        assert stdin is not None and stdout is not None

        def appends() -> str:
            stdin.write("go\n")
            stdin.flush()
            return stdout.readline().strip()

        try:
            assert appends() == "ok"
            disk.fill([writer.pid])
            assert appends() in ("ENOSPC", "EFBIG")
            disk.free([writer.pid])
            assert appends() == "ok"
        finally:
            writer.kill()


APPEND = """
import errno, os, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for _ in sys.stdin:
    try:
        print("ok" if os.write(file, bytes(8192)) == 8192 else "short", flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""


# --- the processes -----------------------------------------------------------------------------


def test_processes_are_found_by_their_mark_and_killed(tmp_path: Path) -> None:
    inner = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    environment = os.environ | {MARK: str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", inner], env=environment, stdin=subprocess.PIPE
    ) as process:
        targets = Targets(mark=str(tmp_path))
        try:
            while len(targets.commands()) < 2:
                assert process.poll() is None
            assert process.pid in targets.commands()
            assert targets.all() == {}
        finally:
            targets.kill_all()
        assert process.wait() == -signal.SIGKILL
        assert targets.commands() == {}
