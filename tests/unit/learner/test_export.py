"""`speed-async export`: a checkpoint as a model folder."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from speed_async.cli import commands
from speed_async.errors import ModelError, SpeedAsyncError
from speed_async.learner.checkpoint.checksums import seal
from speed_async.learner.checkpoint.export import export, find_checkpoint
from speed_async.learner.checkpoint.store import checkpoint_folder
from speed_async.learner.trainer import Trainer
from tests.fakes.learner_samples import random_groups
from tests.fakes.tiny_models import save_tiny_folder
from tests.fakes.trainers import at, make_trainer


def trained(folder: Path, *, tied: bool = False) -> tuple[Trainer, Path]:
    """A trainer of a bfloat16 model after two updates, and its checkpoint."""
    model = save_tiny_folder(folder / "model", tied=tied)
    path = model / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    trainer = make_trainer(model)
    for seed in range(2):
        trainer.update(random_groups(seed))
    trainer.save(at(2))
    return trainer, checkpoint_folder(model / "run" / "checkpoints", 2)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_an_export_has_the_files_of_the_model_and_no_training_state(tmp_path: Path) -> None:
    _, checkpoint = trained(tmp_path)
    export(checkpoint, tmp_path / "out", None)
    expected = {
        path.name: path.read_bytes()
        for path in checkpoint.iterdir()
        if path.is_file() and path.name != "SHA256SUMS"
    }
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected
    assert "model.safetensors" in expected and "config.json" in expected


@pytest.mark.parametrize("tied", [False, True])
def test_a_conversion_starts_from_the_float32_values_of_training(
    tmp_path: Path, tied: bool
) -> None:
    trainer, checkpoint = trained(tmp_path, tied=tied)
    state = trainer.model.state_dict()
    for dtype in (torch.float32, torch.float16):
        out = tmp_path / str(dtype)
        export(checkpoint, out, dtype)
        found = weights(out)
        assert ("lm_head.weight" in found) is not tied
        for name, tensor in found.items():
            assert torch.equal(tensor, state[name].to(dtype)), name
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype)[6:]
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert loaded.dtype == dtype
        assert (
            len({path.stat().st_mode for path in out.iterdir()}) == 1
        )  # as readable as config.json
        assert torch.equal(loaded.state_dict()["lm_head.weight"], state["lm_head.weight"].to(dtype))


def test_a_checkpoint_of_two_learner_ranks_is_put_together(tmp_path: Path) -> None:
    trainer, checkpoint = trained(tmp_path)
    masters = checkpoint / "training" / "weights.tensors"
    halves = {name: tensor.chunk(2) for name, tensor in load_file(masters).items()}
    for rank in range(2):
        rows = {name: each[rank].contiguous() for name, each in halves.items()}
        save_file(rows, masters.with_name(f"weights-{rank + 1:05d}-of-00002.tensors"))
    masters.unlink()
    seal(checkpoint)
    export(checkpoint, tmp_path / "out", torch.float32)
    state = trainer.model.state_dict()
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, state[name]), name


def test_a_damaged_checkpoint_or_an_existing_folder_writes_nothing(tmp_path: Path) -> None:
    _, checkpoint = trained(tmp_path)
    (tmp_path / "taken").mkdir()
    with pytest.raises(SpeedAsyncError, match="taken' exists already: choose another --out"):
        export(checkpoint, tmp_path / "taken", None)
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json does not match its checksum"):
        export(checkpoint, tmp_path / "out", None)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "taken"}


def test_a_failed_export_leaves_no_folder(tmp_path: Path) -> None:
    _, checkpoint = trained(tmp_path)
    (checkpoint / "training" / "weights.tensors").write_bytes(b"damaged")
    seal(checkpoint)
    with pytest.raises(ModelError, match="cannot be exported"):
        export(checkpoint, tmp_path / "out", torch.float32)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_the_command_finds_the_newest_checkpoint_a_version_or_the_best(tmp_path: Path) -> None:
    trainer, checkpoint = trained(tmp_path)
    trainer.update(random_groups(2))
    trainer.save(at(3))
    root = checkpoint.parent
    (root / "best-aime24").symlink_to(checkpoint.name)
    run = root.parent
    assert find_checkpoint(run, None) == checkpoint_folder(root, 3)
    assert find_checkpoint(run, "2") == find_checkpoint(run, "best-aime24") == checkpoint.resolve()
    assert find_checkpoint(checkpoint, None) == checkpoint
    with pytest.raises(SpeedAsyncError, match="no checkpoint '7'; there are: 2, 3, best-aime24"):
        find_checkpoint(run, "7")
    with pytest.raises(SpeedAsyncError, match="not a run folder"):
        find_checkpoint(checkpoint, "2")

    out = tmp_path / "out"
    done = CliRunner().invoke(
        commands, ["export", str(run), "--checkpoint", "2", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert done.output == f"exported {checkpoint.resolve()} to {out}\n"
    assert weights(out)


@pytest.mark.parametrize("dtype", [(), ("--dtype", "float32")])
def test_a_full_disk_is_an_error_of_one_line_and_leaves_no_folder(
    tmp_path: Path, dtype: tuple[str, ...]
) -> None:
    _, checkpoint = trained(tmp_path)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "speed_async", "export", str(checkpoint), "--out", str(out)]

    def limit_file_size() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    done = subprocess.run(
        [*command, *dtype], preexec_fn=limit_file_size, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: '{out}' cannot be written: "), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_weights_that_a_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    trainer, checkpoint = trained(tmp_path)
    with torch.no_grad():
        next(trainer.model.parameters())[0, 0] = 1e5
    trainer.save(at(2))
    with pytest.raises(ModelError, match=r"weights up to 1e\+05 exceed torch.float16"):
        export(checkpoint, tmp_path / "out", torch.float16)
