"""One checkpoint: a Hugging Face model folder; all else that training needs lies in `training/`.

Written under a temporary name, sealed with checksums (checksums.py), then renamed: under its final
name it is always whole. Loaders read whatever looks like weights (vLLM every `*.safetensors`), so
nothing but the model lies where they look, and the optimiser's tensors bear a suffix of their own.
`training/` holds those, the random states of the process, and the learner's progress. The learning
rate is no state: it follows from the number of updates (`warmed_up_lr`). No pickles.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from speed_async.config.whole_file import flush
from speed_async.errors import ModelError, SpeedAsyncError
from speed_async.learner.checkpoint.checksums import damage, seal
from speed_async.learner.checkpoint.model_files import CONFIG_FILE, names_class
from speed_async.learner.checkpoint.random_states import random_states, restore_random_states
from speed_async.learner.checkpoint.store import TRAINER_FILE, TRAINING_FOLDER, put, tidy
from speed_async.learner.model import load_model
from speed_async.learner.optimizer import load_named_state
from speed_async.learner.parallel import FullState
from speed_async.learner.progress import Progress, Update

FORMAT = 3
FORMER_FORMAT = 2
"""It kept everything beside the model; runs that were begun with it go on."""
OPTIMIZER_FILE = "optimizer.tensors"
"""In the format of safetensors."""
FORMER_OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.json"
GENERATION_FILE = "generation_config.json"
BYTES_PER_PARAMETER = 12
"""Parameter and AdamW's two moments, in float32."""


def save_checkpoint(
    folder: Path,
    *,
    model: PreTrainedModel,
    state: FullState,
    model_files: Mapping[str, bytes],
    progress: Progress,
) -> None:
    """Write `folder` whole or not at all; one of the same name is replaced.

    Raises OSError when the disk is full or not writable: what was there before is then untouched.
    """
    partial = _begin(folder)
    try:
        _write_model(partial, model, state.model, model_files)
        training = partial / TRAINING_FOLDER
        training.mkdir()
        optimizer = {key: value.detach().contiguous() for key, value in state.optimizer.items()}
        save_file(optimizer, training / OPTIMIZER_FILE)
        _write_json(training / RANDOM_FILE, random_states())
        _write_json(training / TRAINER_FILE, {"format": FORMAT, **asdict(progress)})
        _share_as(training / TRAINER_FILE, partial)
        seal(partial)
        put(partial, folder)
    except SafetensorError as error:  # its writer's own word for a full disk
        raise OSError(f"checkpoint '{folder}' cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gives a full disk its room back


def try_checkpoint(
    folder: Path, *, model: PreTrainedModel, model_files: Mapping[str, bytes]
) -> None:
    """Write, and remove again, all of a checkpoint that can be refused before there are tensors to
    save; compare what those will take with what the disk has.

    Raises SpeedAsyncError that says why the first checkpoint would fail.
    """
    what = f"no checkpoint could be written to '{folder.parent}'"
    try:
        partial = _begin(folder)
        try:
            _write_model(partial, model, {}, model_files)
            free = shutil.disk_usage(partial).free
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # it has checkpoints
                folder.parent.rmdir()
    except OSError as error:
        raise SpeedAsyncError(
            f"{what}: {error}; set run.folder to a disk that this user can write to"
        ) from error
    except (ValueError, TypeError) as error:  # transformers' words for what it does not save
        raise ModelError(
            f"{what}: transformers loads the model's {CONFIG_FILE} and refuses to save it "
            f"({' '.join(str(error).split())}); repair that file in model.path"
        ) from error
    needed = BYTES_PER_PARAMETER * sum(each.numel() for each in model.parameters())
    if needed > free:
        raise SpeedAsyncError(
            f"{what}: one takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there; make "
            "room, or set run.folder to another disk"
        )


def load_checkpoint(
    folder: Path,
    *,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    is_whole: bool = False,
) -> Progress:
    """Restore parameters, optimiser and random states bit for bit.

    `is_whole`: its checksums were compared just now (`latest_valid`), and need not be again.
    Raises ModelError when the folder is no checkpoint, a damaged one, or one of another model.
    """
    if not is_whole and (what := damage(folder)):
        raise ModelError(f"checkpoint '{folder}' cannot be restored: {what}")
    try:
        progress = _read_progress(folder)
        saved = load_model(folder, device="cpu")
        model.load_state_dict(saved.state_dict())
        load_named_state(optimizer, model, load_file(_training_file(folder, OPTIMIZER_FILE)))
        random = _read_json(_training_file(folder, RANDOM_FILE))
        restore_random_states(random)  # last: loading draws numbers
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"checkpoint '{folder}' cannot be restored: {error}") from error
    return progress


def _begin(folder: Path) -> Path:
    """The empty folder under whose name a checkpoint is written. Raises OSError."""
    if not folder.parent.is_dir():
        folder.parent.mkdir(parents=True)
        flush(folder.parent.parent)
    tidy(folder.parent)
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir()
    return partial


def _write_model(
    partial: Path,
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    model_files: Mapping[str, bytes],
) -> None:
    """The tensors under the names that loaders expect, and the files that describe them."""
    generation = model.generation_config
    model.generation_config = GenerationConfig()  # transformers refuses to save some that it loads
    try:
        model.save_pretrained(partial, state_dict=tensors)
    finally:
        model.generation_config = generation
    (partial / GENERATION_FILE).unlink(missing_ok=True)
    is_described = names_class(model_files, type(model).__name__)
    for name, content in model_files.items():
        if name != CONFIG_FILE or is_described:  # else transformers' own is of the part trained
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)


def _share_as(example: Path, folder: Path) -> None:
    """Give all files the mode that files have here: safetensors makes its own private."""
    mode = example.stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _training_file(folder: Path, name: str) -> Path:
    training = folder / TRAINING_FOLDER
    if training.is_dir():
        return training / name
    return folder / (FORMER_OPTIMIZER_FILE if name == OPTIMIZER_FILE else name)


def _read_progress(folder: Path) -> Progress:
    record = _read_json(_training_file(folder, TRAINER_FILE))
    if (version := record.pop("format")) not in (FORMER_FORMAT, FORMAT):
        raise ModelError(f"checkpoint '{folder}' has format {version}, not {FORMAT}")
    updates = [
        Update(policy_version=update["policy_version"], lease_ids=tuple(update["lease_ids"]))
        for update in record.pop("recent_updates")
    ]
    return Progress(**record, recent_updates=tuple(updates))


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record), encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
