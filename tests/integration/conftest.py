"""A run that tests of several files read: their mark is `xdist_group("completed run")`."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.completed_run import IN_NAMESPACE, MAY_SET_HOST_NAME, UPDATES, Completed
from tests.fakes.paths import MODEL
from tests.fakes.run_process import start, train_command, write_config


@pytest.fixture(scope="session")
def sharded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model with its weights in several files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(folder, max_shard_size="200KB")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@contextmanager
def ignored_sighup() -> Iterator[None]:
    """What is started meanwhile ignores SIGHUP, as under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def completed(sharded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Completed:
    """A run that starts from a sharded model, under nohup, on a host whose name cannot be resolved
    (where this user may set the name). SIGHUP is sent to its processes while they train."""
    folder = tmp_path_factory.mktemp("completed")
    command = train_command(
        write_config(folder, model=sharded_model), "--run.updates", str(UPDATES)
    )
    host = IN_NAMESPACE if MAY_SET_HOST_NAME else ()
    with ignored_sighup():
        run = start(folder, [*host, *command])
    run.wait_for_steps(1)
    for process_id in (run.process.pid, *run.processes()):
        os.kill(process_id, signal.SIGHUP)
    status, out, err = run.finish()
    assert status == 0, err
    assert run.processes() == {}
    return Completed(run=run, out=out, err=err)


@pytest.fixture(scope="session")
def checkpoint(completed: Completed) -> Path:
    return completed.run.folder / "checkpoints" / f"version-{UPDATES:06d}"
