"""How ranks find the service: one key in the store that torchrun's agent already serves.

Torch is imported here for the store's client only.
"""

import asyncio
import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from speed_async.errors import DeadlineExceeded, SpeedAsyncError

POLL_S = 0.1
ENDED_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceAddress:
    host: str
    port: int
    feed_port: int
    run_folder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """This process's place, as torchrun set it in the environment."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    restart: int

    @staticmethod
    def from_environment() -> "Rank":
        try:
            return Rank(
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                local_rank=int(os.environ["LOCAL_RANK"]),
                local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
                restart=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            )
        except KeyError as missing:
            raise SpeedAsyncError(
                f"environment variable {missing} is not set: start this module with torchrun "
                "(torchrun --nproc-per-node 3 -m speed_async.launch CONFIG), "
                "or use `speed-async train CONFIG`"
            ) from None


class Rendezvous:
    """Publishes and finds the service's address. Values are JSON, never pickles."""

    def __init__(self, rank: Rank, timeout_s: float) -> None:
        self._key = f"speed_async/service/{rank.restart}"
        self._timeout_s = timeout_s
        self._store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=timeout_s),
        )

    def publish(self, address: ServiceAddress) -> None:
        self._store.set(self._key, json.dumps(asdict(address)))

    def end(self) -> None:
        """The run is over: no actor need be started again."""
        self._store.set(f"{self._key}/ended", "yes")

    async def until_ended(self) -> None:
        """Return when the run is over."""
        while not await asyncio.to_thread(self._has_ended):  # noqa: ASYNC110 - a store to ask
            await asyncio.sleep(ENDED_POLL_S)

    def _has_ended(self) -> bool:
        try:
            return self._store.check([f"{self._key}/ended"])
        except RuntimeError:  # the store is out of reach: then torchrun ends this rank
            return False

    async def find(self, stopping: asyncio.Event) -> ServiceAddress | None:
        """Wait until the learner has published; None when a stop came first.

        Raises DeadlineExceeded.
        """
        ends_s = time.monotonic() + self._timeout_s
        while not stopping.is_set():
            if self._store.check([self._key]):
                return ServiceAddress(**json.loads(self._store.get(self._key)))
            if time.monotonic() > ends_s:
                raise DeadlineExceeded(
                    "the learner (rank 0)", "the buffer service's address", self._timeout_s
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), POLL_S)
        return None
