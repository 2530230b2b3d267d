"""A TCP proxy on loopback whose connections can be delayed, stalled, cut and refused.

It stands before the service's port, in a thread with an event loop of its own; actors and learner
are sent to it by `cluster.advertised_port`.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

CHUNK_BYTES = 64 * 1024
QUEUED_CHUNKS = 64
START_DEADLINE_S = 60.0
LOOK_S = 0.1


def is_listened_at(port: int) -> bool:
    """Whether a process of this machine listens at this port of an IPv4 address."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = (line.split() for line in lines)
    return any(each[3] == "0A" and int(each[1].split(":")[1], 16) == port for each in fields)


class Proxy:
    """Context manager. All methods may be called from any thread; they take effect at once."""

    def __init__(self, target_port: int) -> None:
        self.port = 0
        self.num_accepted = 0
        self.num_bytes = 0
        self._target_port = target_port
        self._delay_s = 0.0
        self._refusing = False
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(START_DEADLINE_S), "the proxy did not start"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(START_DEADLINE_S)
        assert not self._thread.is_alive(), "the proxy did not end"

    def delay(self, delay_s: float) -> None:
        """Every chunk, either way, arrives this much later; 0 ends it."""
        self._call(lambda: setattr(self, "_delay_s", delay_s))

    def stall(self) -> None:
        """Connections stay, and nothing moves."""
        self._call(lambda: self._moving.clear())

    def cut(self) -> None:
        """Reset all connections, in the middle of whatever they carry; new ones are taken."""
        self._call(self._abort_all)

    def refuse(self) -> None:
        """Cut, and close every new connection at once."""

        def act() -> None:
            self._refusing = True
            self._abort_all()

        self._call(act)

    def restore(self) -> None:
        """Move everything again, at once, and take new connections."""

        def act() -> None:
            self._delay_s, self._refusing = 0.0, False
            self._moving.set()

        self._call(act)

    def _call(self, act: Callable[[], object]) -> None:
        done = threading.Event()

        def run() -> None:
            act()
            done.set()

        self._loop.call_soon_threadsafe(run)
        assert done.wait(START_DEADLINE_S), "the proxy's event loop is stuck"

    def _abort_all(self) -> None:
        for pair in self._pairs:
            for writer in pair:
                writer.transport.abort()

    def _main(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._over = asyncio.Event()
        self._moving = asyncio.Event()
        self._moving.set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        while not self._over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), LOOK_S)
            # Whoever knocks here must find nobody while nobody is behind it.
            listens = await asyncio.to_thread(is_listened_at, self._target_port)
            if listens != server.is_serving():
                server.close()
                if listens:
                    server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        server.close()
        self._abort_all()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_accepted += 1
        if self._refusing:
            writer.transport.abort()
            return
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:  # the service is down: so is this connection
            writer.transport.abort()
            return
        pair = (writer, forth)
        self._pairs.add(pair)
        try:
            await asyncio.wait(
                [
                    asyncio.create_task(self._pump(reader, forth)),
                    asyncio.create_task(self._pump(back, writer)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            self._pairs.discard(pair)
            for end in pair:
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reading and writing are apart, so that a delay is latency and costs no throughput."""
        clock = self._loop.time
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_CHUNKS)

        async def write() -> None:
            while True:
                due_s, chunk = await chunks.get()
                await asyncio.sleep(max(0.0, due_s - clock()))
                await self._moving.wait()
                if not chunk:
                    return
                writer.write(chunk)
                await writer.drain()
                self.num_bytes += len(chunk)

        async def read() -> None:
            chunk = b"-"
            while chunk:
                chunk = await reader.read(CHUNK_BYTES)
                await chunks.put((clock() + self._delay_s, chunk))

        writing, reading = asyncio.create_task(write()), asyncio.create_task(read())
        try:
            await asyncio.wait([writing, reading], return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in (writing, reading):
                task.cancel()
            await asyncio.gather(writing, reading, return_exceptions=True)
