"""A TCP proxy on loopback whose connections can be delayed, stalled, cut and refused.

It runs in front of the service's port, in a thread with its own event loop. Actors and learner
connect to it through `cluster.advertised_port`.
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
POLL_S = 0.1


def is_listening(port: int) -> bool:
    """Whether a local process listens on this IPv4 port."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = (line.split() for line in lines)
    return any(each[3] == "0A" and int(each[1].split(":")[1], 16) == port for each in fields)


class Proxy:
    """Context manager. All methods are thread-safe and take effect at once."""

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
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(START_DEADLINE_S)
        assert not self._thread.is_alive(), "the proxy did not stop"

    def delay(self, delay_s: float) -> None:
        """Delay every chunk in both directions; 0 ends the delay."""
        self._call(lambda: setattr(self, "_delay_s", delay_s))

    def stall(self) -> None:
        """Keep connections open, but transfer nothing."""
        self._call(lambda: self._transferring.clear())

    def cut(self) -> None:
        """Reset all connections, even in the middle of a message. New ones are accepted."""
        self._call(self._abort_all)

    def refuse(self) -> None:
        """Reset all connections, and close every new one at once."""

        def action() -> None:
            self._refusing = True
            self._abort_all()

        self._call(action)

    def restore(self) -> None:
        """Transfer everything again, and accept new connections."""

        def action() -> None:
            self._delay_s, self._refusing = 0.0, False
            self._transferring.set()

        self._call(action)

    def _call(self, action: Callable[[], object]) -> None:
        done = threading.Event()

        def run() -> None:
            action()
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
        self._stopped = asyncio.Event()
        self._transferring = asyncio.Event()
        self._transferring.set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        while not self._stopped.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), POLL_S)
            # The proxy must not listen while the service does not listen.
            listens = await asyncio.to_thread(is_listening, self._target_port)
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
            target = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:  # the service is down
            writer.transport.abort()
            return
        target_reader, target_writer = target
        pair = (writer, target_writer)
        self._pairs.add(pair)
        try:
            await asyncio.wait(
                [
                    asyncio.create_task(self._pump(reader, target_writer)),
                    asyncio.create_task(self._pump(target_reader, writer)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            self._pairs.discard(pair)
            for end in pair:
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read and write in separate tasks: a delay adds latency and costs no throughput."""
        clock = self._loop.time
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_CHUNKS)

        async def write() -> None:
            while True:
                due_s, chunk = await chunks.get()
                await asyncio.sleep(max(0.0, due_s - clock()))
                await self._transferring.wait()
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
