"""Training in the learner ranks: connects model, trainer, weight sender and link with the loops.

Separate from learner_role.py and follower_role.py because its imports take seconds.
"""

import asyncio
import gc
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
from torch._C._distributed_c10d import Store, TCPStore
from transformers import PreTrainedModel

from speed_async.config.local_model import model_folder
from speed_async.config.model_facts import read_model_info
from speed_async.config.model_family import has_only_attention, routing_notice
from speed_async.config.schema import Config
from speed_async.launcher.attempt import Attempt
from speed_async.launcher.exit_status import describe
from speed_async.launcher.gpus import local_actor_gpus
from speed_async.launcher.identity.identity import DATA, Identity
from speed_async.launcher.identity.model_files import model_fingerprint
from speed_async.launcher.rank import Rank
from speed_async.launcher.rendezvous import node_rendezvous
from speed_async.learner.inbox import Stop
from speed_async.learner.loop import LearnerLoop
from speed_async.learner.parallel.followers import NAMING_S, Followers, LeadTrainer
from speed_async.learner.parallel.following import FollowerLoop
from speed_async.learner.parallel.ranks import ONE_RANK, Ranks, join_ranks, leave_ranks
from speed_async.learner.parallel.sharding import load_for_rank
from speed_async.learner.progress import Progress, Restored, RunResult
from speed_async.learner.trainer import Trainer
from speed_async.transport import messages as m
from speed_async.transport.curve import server_keys
from speed_async.transport.following import LeadPlan
from speed_async.transport.transport import Link
from speed_async.transport.zeromq import open_hub
from speed_async.weight_sync.broadcast import TorchSender
from speed_async.weight_sync.buckets import flatten_parameters
from speed_async.weight_sync.device import resolve_device
from speed_async.weight_sync.network_device import device_with, own_address
from speed_async.weight_sync.process_group import choose_backend, host_store

QUEUED_MESSAGES = 4096
"""For signs of life of followers that wait because this process is slow."""


async def learn(
    attempt: Attempt, rank: Rank, link: Link, stop: Stop, identity: Identity
) -> RunResult:
    """Train until the run ends or `stop` is set."""
    config = attempt.config
    _prepare_torch(config)
    if config.cluster.learners == 1:
        return await _learn(attempt, rank, link, stop, identity, None)
    followers = await _gather_followers(config)
    watching = asyncio.create_task(followers.watch(), name="followers")
    learning = asyncio.create_task(
        _learn(attempt, rank, link, stop, identity, followers), name="training"
    )
    error = ""
    try:
        await asyncio.wait((learning, watching), return_when=asyncio.FIRST_COMPLETED)
        if not learning.done() or learning.exception() is not None:
            # The loss of a follower breaks the process group; it is the better error.
            await asyncio.wait((watching,), timeout=2 * NAMING_S)
        if watching.done():
            watching.result()
        return await learning
    except asyncio.CancelledError:
        error = "learner: was ended because another role of node 0 failed, which reports why"
        raise
    except Exception as failure:
        error = describe("learner", failure)
        raise
    finally:
        watching.cancel()
        learning.cancel()
        await asyncio.wait((learning, watching), timeout=NAMING_S)
        await followers.close(error)
        if not error:  # otherwise a rank may be gone, and NCCL may wait for it
            leave_ranks()


async def follow(
    config: Config, rank: Rank, link: Link, plan: LeadPlan, stopping: asyncio.Event
) -> None:
    """Train as a follower until the lead ends. Raises SpeedAsyncError or RuntimeError."""

    def make_trainer() -> Trainer:
        store = TCPStore(
            plan.store_host,
            plan.store_port,
            is_master=False,
            timeout=timedelta(seconds=config.cluster.connect_timeout_s),
            wait_for_workers=False,
        )
        ranks = _join_ranks(config, rank, store)
        return Trainer(config=config, model=_load(config, ranks), ranks=ranks)

    _prepare_torch(config)
    silence_s = config.cluster.peer_timeout_s
    loop = FollowerLoop(link, silence_s=silence_s, stopping=stopping)
    await loop.run(make_trainer)
    leave_ranks()


def _prepare_torch(config: Config) -> None:
    torch.set_num_threads(config.learner.num_threads)
    torch.manual_seed(config.run.seed)
    compute_in_threads(resolve_device("learner.device", config.learner.device))


def compute_in_threads(device: torch.device) -> None:
    """All later threads of `asyncio.to_thread` have this current device. That of CUDA belongs to a
    thread and is GPU 0 at first, and sharded parameters take the streams of the current device."""
    if device.type == "cuda":
        threads = ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,))
        asyncio.get_running_loop().set_default_executor(threads)


async def _gather_followers(config: Config) -> Followers:
    """Serve the followers until all have joined. Raises DeadlineExceeded."""
    cluster = config.cluster
    hub = await open_hub(
        cluster.host,
        cluster.learner_port,
        field="cluster.learner_port",
        inbox_messages=QUEUED_MESSAGES,
        silence_s=2 * cluster.peer_timeout_s,  # `watch` decides first, and names the silence
        keys=server_keys(cluster),
    )
    node_rendezvous().change(learner_port=hub.port)
    store = host_store(cluster.host, cluster.connect_timeout_s)
    followers = Followers(
        hub,
        store,
        size=cluster.learners,
        silence_s=cluster.peer_timeout_s,
        timeout_s=cluster.stall_timeout_s,
    )
    plan = LeadPlan(config=config.model_dump_json(), store_host=cluster.host, store_port=store.port)
    try:
        await followers.assemble(plan, cluster.connect_timeout_s)
    except BaseException:
        await followers.close()
        raise
    return followers


def _join_ranks(config: Config, rank: Rank, store: Store) -> Ranks:
    cluster = config.cluster
    if sys.platform == "linux":
        # By default gloo uses the device of the machine's host name, which other nodes often cannot
        # reach.
        device = "lo" if cluster.is_loopback else device_with(own_address(cluster.host))
        if device is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", device)
    return join_ranks(
        store,
        rank=rank.rank,
        size=cluster.learners,
        device=resolve_device("learner.device", config.learner.device),
        ranks_per_node=rank.local_world_size,
        timeout_s=cluster.stall_timeout_s,
    )


def _load(config: Config, ranks: Ranks) -> PreTrainedModel:
    folder = model_folder(config.model.path)
    # With adapters, the trainer converts the weights before it moves them. Before that it computes
    # a few tokens, which kernels of other layers than attention may only do on a GPU.
    has_adapters = config.learner.lora_rank > 0
    return load_for_rank(
        folder,
        ranks,
        device=config.learner.device,
        activation_checkpointing=config.learner.activation_checkpointing,
        on_cpu=has_adapters and has_only_attention(read_model_info(folder).record),
    )


async def _learn(
    attempt: Attempt,
    rank: Rank,
    link: Link,
    stop: Stop,
    identity: Identity,
    followers: Followers | None,
) -> RunResult:
    config = attempt.config
    folder = model_folder(config.model.path)
    if followers is None:
        model = await asyncio.to_thread(_load, config, ONE_RANK)
        if not config.learner.lora_rank:
            # Before the optimiser is created. Contiguous parameters are sent without being packed.
            flatten_parameters(model)
        trainer = await asyncio.to_thread(
            Trainer, config=config, model=model, run_id=identity.run_id
        )
    else:
        ranks = await asyncio.to_thread(_join_ranks, config, rank, followers.store)
        model = await asyncio.to_thread(_load, config, ranks)
        trainer = await asyncio.to_thread(
            LeadTrainer, followers, config=config, model=model, run_id=identity.run_id, ranks=ranks
        )
    if notice := routing_notice(model.config.get_text_config().to_dict()):
        sys.stderr.write(f"{notice}\n")
    restored = None
    if (found := attempt.checkpoint) is not None:
        progress = Progress()
        if found.folder is not None:
            progress = await asyncio.to_thread(trainer.restore, found.folder, is_whole=True)
        restored = Restored(progress=progress, notices=found.notices)
    if attempt.number == 0:  # a resumed run may wait for disk space at its next checkpoint instead
        await asyncio.to_thread(trainer.check_save)
    device = resolve_device("learner.device", config.learner.device)
    sender = TorchSender(
        host=config.cluster.host,
        bucket_bytes=config.weights.bucket_bytes,
        device=device,
        store_timeout_s=config.weights.deadline_s,
    )
    backend = choose_backend(
        config.weights.backend,
        device,
        actor_gpus=local_actor_gpus(config, rank, torch.cuda.device_count()),
        one_machine=not rank.has_many_nodes,
        actors_device="auto" if config.actors.engine == "vllm" else config.actors.device,
    )
    loop = LearnerLoop(
        config,
        link=link,
        trainer=trainer,
        sender=sender,
        backend=backend,
        stop=stop,
        restored=restored,
    )
    gc.freeze()  # excludes imported modules from full collections
    try:
        return await loop.run(
            m.Hello(
                role="learner",
                index=rank.rank,
                incarnation=attempt.number,
                fingerprint=identity.things[DATA].digest,
                model_fingerprint=model_fingerprint(folder, config.model),
                process_id=os.getpid(),
            )
        )
    finally:
        sender.close()
