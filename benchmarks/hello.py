"""The first message of a peer with synthetic groups."""

import os
from functools import cache
from pathlib import Path

from benchmarks.harness import MODEL, TASK
from speed_async.config.sections.model import ModelConfig
from speed_async.config.sections.task import TaskConfig
from speed_async.environments.registry import make_task
from speed_async.environments.task import data_fingerprint
from speed_async.launcher.identity.model_files import model_fingerprint
from speed_async.transport import messages as m


def hello(role: str, index: int) -> m.Hello:
    data, model = _fingerprints()
    return m.Hello(
        role=role,
        index=index,
        incarnation=0,
        process_id=os.getpid(),
        fingerprint=data,
        model_fingerprint=model,
    )


@cache
def _fingerprints() -> tuple[str, str]:
    """Of the data and of the model."""
    model = ModelConfig.model_validate(MODEL)
    task = make_task(TaskConfig.model_validate(TASK))
    return data_fingerprint(task, {}), model_fingerprint(Path(model.path), model)
