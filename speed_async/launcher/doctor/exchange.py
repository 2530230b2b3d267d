"""One rank of `speed-async doctor`: joins the others, exchanges facts, and measures.

All waits have deadlines. Rank 0 decides who is present, so that all ranks continue with the same
members. A backend that fails is recorded, and the next step follows.
"""

import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.cuda import nccl

from speed_async.launcher.doctor.measure import measure_backend, measure_round_trips
from speed_async.launcher.doctor.records import (
    ATTENDANCE,
    FACTS,
    GLOO,
    NCCL,
    REPORT,
    Attendance,
    Exchange,
    Gpu,
    RankFacts,
    RankJob,
    RankReport,
)
from speed_async.launcher.doctor.versions import installed_versions
from speed_async.types import WeightOffer
from speed_async.weight_sync.process_group import await_keys, describe_error, make_group

T = TypeVar("T")
LEAVE_S = 5.0
"""Rank 0 serves the store for at most this long after it has its own result."""
SHARED_FILE_S = 5.0
"""Network file systems show a new file after this time at the latest."""
POLL_S = 0.2
ATTENDED = "attendance"
SAME_OPTIONS = (
    "give every node its own --node-rank, and the same --nnodes and --nproc-per-node (or the same "
    "configuration)"
)


class Refused(Exception):
    """The nodes were not started for the same run. `str(error)` names the remedy."""


def exchange(job: RankJob, show_stage: Callable[[str], None]) -> Exchange:
    """Returns what this rank knows at the end. Raises only for mistakes in this program."""
    address = f"{job.host}:{job.port}"
    show_stage(f"connecting to rank 0 at {address}")
    try:
        store = _open_store(job)
    except RuntimeError as error:  # torch.distributed's errors
        return Exchange(
            fault=f"cannot reach node 0 at {address} ({describe_error(error)}): start "
            "`speed-async doctor ... --node-rank 0` there at the same time, and open port "
            f"{job.port} from this node to it"
        )
    try:
        if store.add(f"processes/{job.rank}", 1) > 1:
            return Exchange(fault=f"two processes have rank {job.rank}: {SAME_OPTIONS}")
        try:
            result = _meet(store, job, show_stage)
        except Refused as error:
            result = Exchange(fault=str(error))
        _leave(store, job)
    except RuntimeError as error:
        return Exchange(
            fault=f"lost node 0 at {address} ({describe_error(error)}): see the output there"
        )
    return result


def _meet(store: Store, job: RankJob, show_stage: Callable[[str], None]) -> Exchange:
    """Raises RuntimeError, and Refused."""
    show_stage("waiting for the other ranks")
    missing = _announce(store, job)
    present = [rank for rank in range(job.world_size) if rank not in missing]
    facts = _read(store, {rank: f"facts/{rank}" for rank in present}, FACTS)
    for each in facts:
        _require_one_world(each.node, each.world_size, job)
    if missing:
        return Exchange(facts=facts, missing=missing)
    report = _measure(store, job, facts, show_stage)
    show_stage("waiting for the reports of the other ranks")
    reports, silent = _share(store, job, report)
    return Exchange(facts=facts, reports=reports, silent=silent)


def _open_store(job: RankJob) -> TCPStore:
    timeout = timedelta(seconds=job.timeout_s)
    if job.rank:
        return TCPStore(
            job.host, job.port, is_master=False, timeout=timeout, wait_for_workers=False
        )
    return TCPStore(
        job.host,
        job.port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=job.listener,
    )


def _own_facts(job: RankJob) -> RankFacts:
    versions = installed_versions()
    num_gpus = torch.cuda.device_count()
    if num_gpus:
        versions["NCCL"] = ".".join(map(str, nccl.version()))
    return RankFacts(
        rank=job.rank,
        node=job.rank // job.local_world_size,
        world_size=job.world_size,
        host_name=socket.gethostname(),
        versions=versions,
        has_own_gpu=num_gpus >= job.local_world_size,
        gpus=[_gpu(index) for index in range(num_gpus)] if job.leads_node else [],
        inputs=job.inputs,
        shared_file=job.shared_file,
    )


def _gpu(index: int) -> Gpu:
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(
        name=torch.cuda.get_device_name(index),
        free_bytes=free,
        total_bytes=total,
        capability=f"{major}.{minor}",
        has_bfloat16=(major, minor) >= (8, 0),
    )


def _announce(store: Store, job: RankJob) -> list[int]:
    """Share the facts of this rank. Returns the ranks that did not connect within the deadline, as
    rank 0 found. Raises RuntimeError and Refused."""
    store.set(f"facts/{job.rank}", FACTS.dump_json(_own_facts(job)).decode())
    if job.rank == 0:
        keys = {rank: f"facts/{rank}" for rank in range(job.world_size)}
        missing = await_keys(store, keys, job.timeout_s, ())
        found = Attendance(world_size=job.world_size, missing=missing)
        store.set(ATTENDED, ATTENDANCE.dump_json(found).decode())
        return missing
    # Rank 0 may still be loading PyTorch when another rank connects.
    if await_keys(store, {0: ATTENDED}, 3 * job.timeout_s, ()):
        raise RuntimeError(f"rank 0 did not respond within {3 * job.timeout_s:g} s")
    [found] = _read(store, {0: ATTENDED}, ATTENDANCE)
    _require_one_world(0, found.world_size, job)
    return found.missing


def _require_one_world(node: int, world_size: int, job: RankJob) -> None:
    if world_size != job.world_size:
        raise Refused(
            f"node {node} was started for {world_size} ranks, and this one for {job.world_size}: "
            f"{SAME_OPTIONS}"
        )


def _share(store: Store, job: RankJob, report: RankReport) -> tuple[list[RankReport], list[int]]:
    """The reports of all ranks, and the ranks that sent none."""
    store.set(f"report/{job.rank}", REPORT.dump_json(report).decode())
    keys = {rank: f"report/{rank}" for rank in range(job.world_size)}
    silent = await_keys(store, keys, 3 * job.timeout_s, ())
    told = {rank: key for rank, key in keys.items() if rank not in silent}
    return _read(store, told, REPORT), silent


def _read(store: Store, keys: Mapping[int, str], kind: TypeAdapter[T]) -> list[T]:
    """The records of these ranks. Raises Refused for one that another release has written."""
    records = []
    for rank, key in keys.items():
        try:
            records.append(kind.validate_json(store.get(key)))
        except ValidationError:
            raise Refused(
                f"rank {rank} sent a record that this release cannot read; install the same "
                "version of speed_async on all nodes"
            ) from None
    return records


def _measure(
    store: Store, job: RankJob, facts: list[RankFacts], show_stage: Callable[[str], None]
) -> RankReport:
    round_trip_s = clock_offset_s = None
    all_reduce_s: dict[str, float] = {}
    faults: dict[str, str] = {}
    devices = {GLOO: torch.device("cpu")}
    if all(each.has_own_gpu for each in facts):
        devices[NCCL] = torch.device("cuda", job.local_rank)
    for backend, device in devices.items() if job.world_size > 1 else ():
        show_stage(f"forming a {backend} group of {job.world_size} ranks")
        try:
            group = make_group(
                PrefixStore(backend, store), _offer(job, backend), device, lambda: False
            )
            show_stage(f"measuring {backend}")
            if backend == GLOO:
                ranks = job.rank, job.world_size
                round_trip_s, clock_offset_s = measure_round_trips(group, *ranks, job.timeout_s)
            all_reduce_s[backend] = measure_backend(
                group, backend, device, rank=job.rank, size=job.world_size, timeout_s=job.timeout_s
            )
        except RuntimeError as error:
            faults[backend] = describe_error(error)
    [shared_file] = [each.shared_file for each in facts if each.rank == 0]
    return RankReport(
        rank=job.rank,
        round_trip_s=round_trip_s,
        clock_offset_s=clock_offset_s,
        all_reduce_s=all_reduce_s,
        faults=faults,
        sees_shared_file=_sees(job.shared_folder, shared_file),
    )


def _offer(job: RankJob, backend: str) -> WeightOffer:
    return WeightOffer(
        policy_version=0,
        epoch=0,
        rank=job.rank,
        world_size=job.world_size,
        store_host=job.host,
        store_port=job.port,
        backend="nccl" if backend == NCCL else "gloo",
        deadline_s=job.timeout_s,
    )


def _sees(folder: str | None, name: str | None) -> bool | None:
    """Whether the file of rank 0 is in this folder; None if there is nothing to compare."""
    if folder is None or name is None:
        return None
    ends_s = time.monotonic() + SHARED_FILE_S
    # The name comes from another process: only its last part is used.
    while not (Path(folder) / Path(name).name).exists():
        if time.monotonic() > ends_s:
            return False
        time.sleep(POLL_S)
    return True


def _leave(store: Store, job: RankJob) -> None:
    """Rank 0 serves the store until every other rank that came has read it."""
    if job.rank:
        store.set(f"left/{job.rank}", "")
        return
    came = [rank for rank in range(1, job.world_size) if store.check([f"facts/{rank}"])]
    await_keys(store, {rank: f"left/{rank}" for rank in came}, LEAVE_S, ())
