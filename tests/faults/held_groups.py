"""The groups that the journal of a finished run still holds."""

import json
import shutil
import tempfile
from pathlib import Path

from speed_async.buffer.durability.recovery import open_machine
from speed_async.buffer.service import BufferService
from speed_async.buffer.state import ServiceState
from speed_async.config.load import build_config
from speed_async.config.schema import Config
from speed_async.environments.registry import make_task
from speed_async.environments.task import data_fingerprint
from speed_async.launcher.identity.model_files import model_fingerprint
from speed_async.transport import messages as m
from speed_async.transport.codec import decode
from speed_async.transport.tracing import group_digest


def held_groups(run_folder: Path) -> set[str]:
    """Digests (transport/tracing.py) of the groups that a service recovered from this journal
    would have buffered or in training, each decoded from its record."""
    config = build_config(json.loads((run_folder / "config.json").read_text()))
    with tempfile.TemporaryDirectory() as copy:
        folder = Path(copy) / "journal"
        shutil.copytree(run_folder / "journal", folder)
        data, model = _fingerprints(config)
        machine, _ = open_machine(folder, config, _build, data=data, model=model, attempt=0)
        journal, lifecycle = machine.journal, machine.service.lifecycle
        assert journal is not None
        waiting = list(lifecycle.groups.buffer.waiting())
        held: set[str] = set()
        for group in [*waiting, *lifecycle.groups.in_training.values()]:
            assert group.place is not None
            message = decode(journal.read(group.place).frames)
            assert isinstance(message, m.GroupFinished)
            held.add(group_digest(message))
        journal.close()
        return held


def _fingerprints(config: Config) -> tuple[str, str]:
    data = data_fingerprint(make_task(config.task), {})
    return data, model_fingerprint(Path(config.model.path), config.model)


def _build(config: Config, state: ServiceState | None) -> BufferService:
    task = make_task(config.task)
    data, model = _fingerprints(config)
    return BufferService(
        config,
        num_prompts=len(task.train_prompts),
        num_held_out=len(task.held_out_prompts),
        fingerprint=data,
        model_fingerprint=model,
        started_s=0.0,
        state=state,
    )
