"""How ranks find the service: a few keys in the store that torchrun's agent already serves.

The store outlives ranks that are started again, and so does what an earlier life wrote there: an
address is good only while its service listens, and until another takes its place. (Nothing else
tells: agents of several nodes count restarts each for itself.) The run folder's key is how a
restarted learner knows where to go on. Torch is imported here for the store's client only.
"""

import asyncio
import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from speed_async.errors import DeadlineExceeded, SpeedAsyncError
from speed_async.runtime.ports import listens

POLL_S = 0.1
ENDED_POLL_S = 0.5
CONNECT_TIMEOUT_S = 2.0
FOLDER_KEY = "speed_async/run_folder"
ADDRESS_KEY = "speed_async/service"
ENDED_KEY = "speed_async/ended"
FINISHED_KEY = "speed_async/finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceAddress:
    host: str
    port: int
    feed_port: int
    run_folder: str
    life: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """This process's place, as torchrun set it in the environment."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @staticmethod
    def from_environment() -> "Rank":
        try:
            return Rank(
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                local_rank=int(os.environ["LOCAL_RANK"]),
                local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            )
        except KeyError as missing:
            raise SpeedAsyncError(
                f"environment variable {missing} is not set: start this module with torchrun "
                "(torchrun --nproc-per-node 3 -m speed_async.launch CONFIG), "
                "or use `speed-async train CONFIG`"
            ) from None


class Rendezvous:
    """Publishes and finds the service's address. Values are text and JSON, never pickles."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=timeout_s),
        )

    # --- the leading learner -------------------------------------------------------------------

    def begun_in(self) -> Path | None:
        """The run folder that these ranks had before they were started again."""
        if not self._store.check([FOLDER_KEY]):
            return None
        return Path(self._store.get(FOLDER_KEY).decode())

    def begin(self, run_folder: Path) -> None:
        """Note where this run is, and that nobody serves it yet."""
        self._store.delete_key(ADDRESS_KEY)
        self._store.set(FOLDER_KEY, str(run_folder))

    def publish(self, address: ServiceAddress) -> None:
        self._store.set(ADDRESS_KEY, json.dumps(asdict(address)))

    def end(self, life: int) -> None:
        """The run is over: no actor need be started again."""
        self._store.set(f"{ENDED_KEY}/{life}", "yes")

    def nothing_to_do(self) -> None:
        """The run was finished before these ranks came: nobody will serve them."""
        self._store.set(FINISHED_KEY, "yes")

    # --- everybody else ------------------------------------------------------------------------

    async def find(self, stopping: asyncio.Event) -> ServiceAddress | None:
        """Wait until the learner has published a service that listens; None when a stop came first,
        and where there is nothing to do.

        Raises DeadlineExceeded.
        """
        ends_s = time.monotonic() + self._timeout_s
        while not stopping.is_set() and not self._store.check([FINISHED_KEY]):
            address = self._published()
            if address is not None and await listens(
                address.host, address.port, timeout_s=CONNECT_TIMEOUT_S
            ):
                return address
            if time.monotonic() > ends_s:
                raise DeadlineExceeded(
                    "the learner (rank 0)", "the buffer service's address", self._timeout_s
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), POLL_S)
        return None

    async def until_over(self, life: int) -> None:
        """Return when this life has ended, or another has taken its place."""
        while not await asyncio.to_thread(self._is_over, life):  # noqa: ASYNC110 - a store to ask
            await asyncio.sleep(ENDED_POLL_S)

    def is_replaced(self, life: int) -> bool:
        """Whether the service of another life has been published."""
        address = self._published()
        return address is not None and address.life != life

    def _is_over(self, life: int) -> bool:
        try:
            return self._store.check([f"{ENDED_KEY}/{life}"]) or self.is_replaced(life)
        except RuntimeError:  # the store is out of reach: then torchrun ends this rank
            return False

    def _published(self) -> ServiceAddress | None:
        if not self._store.check([ADDRESS_KEY]):
            return None
        return ServiceAddress(**json.loads(self._store.get(ADDRESS_KEY)))
