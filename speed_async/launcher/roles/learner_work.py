"""Training in rank 0: connects model, trainer, weight sender and link with the learner loop.

Separate from learner_role.py because its imports take seconds.
"""

import asyncio
import gc
import os
import sys

import torch

from speed_async.config.local_model import model_folder
from speed_async.config.model_family import routing_notice
from speed_async.launcher.attempt import Attempt
from speed_async.launcher.gpus import local_actor_gpus
from speed_async.launcher.identity.identity import DATA, Identity
from speed_async.launcher.identity.model_files import model_fingerprint
from speed_async.launcher.rank import Rank
from speed_async.learner.inbox import Stop
from speed_async.learner.loop import LearnerLoop
from speed_async.learner.model import load_model
from speed_async.learner.progress import Progress, Restored, RunResult
from speed_async.learner.trainer import Trainer
from speed_async.transport import messages as m
from speed_async.transport.transport import Link
from speed_async.weight_sync.broadcast import TorchSender
from speed_async.weight_sync.buckets import flatten_parameters
from speed_async.weight_sync.process_group import choose_backend


async def learn(
    attempt: Attempt, rank: Rank, link: Link, stop: Stop, identity: Identity
) -> RunResult:
    """Train until the run ends or `stop` is set."""
    config = attempt.config
    folder = model_folder(config.model.path)
    torch.set_num_threads(config.learner.num_threads)
    torch.manual_seed(config.run.seed)
    model = await asyncio.to_thread(load_model, folder, device=config.learner.device)
    if notice := routing_notice(model.config.get_text_config().to_dict()):
        sys.stderr.write(f"{notice}\n")
    # Before the optimiser is created. Contiguous parameters are sent without being packed.
    flatten_parameters(model)
    trainer = Trainer(config=config, model=model, run_id=identity.run_id)
    restored = None
    if (found := attempt.checkpoint) is not None:
        progress = Progress()
        if found.folder is not None:
            progress = await asyncio.to_thread(trainer.restore, found.folder, is_whole=True)
        restored = Restored(progress=progress, notices=found.notices)
    if attempt.number == 0:  # a resumed run may wait for disk space at its next checkpoint instead
        await asyncio.to_thread(trainer.check_save)
    device = next(model.parameters()).device
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
