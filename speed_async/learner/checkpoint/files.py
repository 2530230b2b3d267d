"""One checkpoint: a Hugging Face model folder with the training state in `training/`.

A checkpoint is written under a temporary name, sealed with checksums (checksums.py), then renamed.
Under its final name it is always complete. Loaders read every file that looks like weights (vLLM
reads every `*.safetensors`), so the top level contains only the model, and the optimiser tensors
have a different suffix. Weights are stored in the dtype of the initial model. `training/` contains
their float32 values (where that is another dtype), the optimiser tensors, the random states of the
process, and the learner's progress. With several learner ranks, each of them writes its rows of the
float32 values and of the optimiser tensors (shards.py), and rank 0 everything else. The learning
rate is not stored: it follows from the number of updates (`learning_rate`). No pickles are used.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from speed_async.config.whole_file import flush
from speed_async.errors import ModelError, SpeedAsyncError
from speed_async.learner.adapters import has_adapters
from speed_async.learner.checkpoint.captured import MASTER, OPTIMIZER, Captured
from speed_async.learner.checkpoint.checksums import damage, seal
from speed_async.learner.checkpoint.dtypes import WeightDtypes, stored_tensors, tensor_bytes
from speed_async.learner.checkpoint.model_files import (
    CONFIG_FILE,
    LEGACY_OPTIMIZER_FILE,
    declares_class,
)
from speed_async.learner.checkpoint.random_states import restore_random_states
from speed_async.learner.checkpoint.shards import (
    SUFFIX,
    SavedRows,
    load_parameters,
    load_state,
    load_weights,
    saved_paths,
)
from speed_async.learner.checkpoint.store import TRAINER_FILE, TRAINING_FOLDER, clean_up, commit
from speed_async.learner.model import load_model
from speed_async.learner.progress import Progress, Update

FORMAT = 5
WITHOUT_COUNT = (2, 3)
LEGACY_FORMATS = (*WITHOUT_COUNT, 4)
"""Formats that can still be resumed. All weights are float32. Format 2 has all files next to the
model, and 2 and 3 do not count optimiser updates."""
MASTER_FILE = f"{MASTER}{SUFFIX}"
OPTIMIZER_FILE = f"{OPTIMIZER}{SUFFIX}"
"""In the format of safetensors, as MASTER_FILE."""
RANDOM_FILE = "random.json"
GENERATION_FILE = "generation_config.json"


def save_checkpoint(
    folder: Path,
    *,
    model: PreTrainedModel,
    captured: Captured,
    model_files: Mapping[str, bytes],
    dtypes: WeightDtypes,
    progress: Progress,
    save_training: Callable[[Path], None],
) -> None:
    """Writes `folder` atomically and replaces a checkpoint of the same name. Uses no tensor of
    `model`, which may be trained meanwhile.

    `save_training` writes the training state of all ranks to the folder it is given.
    Raises OSError when the disk is full or not writable; existing checkpoints are then unchanged.
    """
    partial = _make_partial_folder(folder)
    try:
        write_model(partial, model, captured.model, model_files, dtypes)
        training = partial / TRAINING_FOLDER
        training.mkdir()
        save_training(training)
        _write_json(training / RANDOM_FILE, captured.random)
        _write_json(training / TRAINER_FILE, {"format": FORMAT, **asdict(progress)})
        copy_mode(training / TRAINER_FILE, partial)
        seal(partial)
        commit(partial, folder)
    except SafetensorError as error:  # raised by the safetensors writer on a full disk
        raise OSError(f"checkpoint '{folder}' cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # frees space on a full disk


def check_can_save(
    folder: Path,
    *,
    model: PreTrainedModel,
    model_files: Mapping[str, bytes],
    dtypes: WeightDtypes,
) -> None:
    """Writes and removes a checkpoint without tensors, and compares the size of the tensors with
    the free disk space.

    Raises SpeedAsyncError with the reason why the first checkpoint would fail.
    """
    what = f"no checkpoint could be written to '{folder.parent}'"
    try:
        partial = _make_partial_folder(folder)
        try:
            write_model(partial, model, {}, model_files, dtypes)
            free = shutil.disk_usage(partial).free
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: it has checkpoints
                folder.parent.rmdir()
    except OSError as error:
        raise SpeedAsyncError(
            f"{what}: {error}; set run.folder to a disk that this user can write to"
        ) from error
    except (ValueError, TypeError) as error:  # raised by transformers for invalid settings
        raise ModelError(
            f"{what}: transformers loads the model's {CONFIG_FILE} but refuses to save it "
            f"({' '.join(str(error).split())}); fix that file in model.path"
        ) from error
    needed = tensor_bytes(model, dtypes)
    if needed > free:
        raise SpeedAsyncError(
            f"{what}: it needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; free disk "
            "space, or set run.folder to another disk"
        )


def load_checkpoint(
    folder: Path,
    *,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    is_whole: bool = False,
) -> Progress:
    """Restores parameters, optimiser and random states bitwise.

    `is_whole` skips the checksums, which `latest_valid` has already verified.
    Raises ModelError when the folder is not a checkpoint, is damaged, or is of another model.
    """
    if not is_whole and (what := damage(folder)):
        raise ModelError(f"checkpoint '{folder}' cannot be restored: {what}")
    try:
        progress = _read_progress(folder)
        training = folder / TRAINING_FOLDER
        masters = saved_paths(training, MASTER)
        saved = SavedRows(masters)
        if has_adapters(model):
            _check_adapters(model, saved)
        elif not masters or masters[0].name == MASTER_FILE:  # then not of all parameters
            load_parameters(model, load_model(folder, device="cpu"))
        load_weights(model, saved)
        moments = saved_paths(training, OPTIMIZER) or [_training_file(folder, OPTIMIZER_FILE)]
        load_state(optimizer, model, SavedRows(moments))
        random = _read_json(_training_file(folder, RANDOM_FILE))
        restore_random_states(random)  # last, because loading uses the generators
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"checkpoint '{folder}' cannot be restored: {error}") from error
    return progress


def _check_adapters(model: PreTrainedModel, saved: SavedRows) -> None:
    """Raises ValueError if the checkpoint has other parameters than the adapters of the model."""
    adapters = {name for name, each in model.named_parameters() if each.requires_grad}
    if set(saved.names()) != adapters:
        raise ValueError("it has other adapters than this run, or none")


def _make_partial_folder(folder: Path) -> Path:
    """Creates the empty temporary folder of a checkpoint. Raises OSError."""
    if not folder.parent.is_dir():
        folder.parent.mkdir(parents=True)
        flush(folder.parent.parent)
    clean_up(folder.parent)
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir()
    return partial


def write_model(
    partial: Path,
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    model_files: Mapping[str, bytes],
    dtypes: WeightDtypes,
) -> None:
    """Writes the tensors under the names that loaders expect, and the model files."""
    generation = model.generation_config
    model.generation_config = GenerationConfig()  # transformers cannot save every config it loads
    try:
        model.save_pretrained(partial, state_dict=stored_tensors(tensors, dtypes))
    finally:
        model.generation_config = generation
    (partial / GENERATION_FILE).unlink(missing_ok=True)
    is_described = declares_class(model_files, type(model).__name__)
    if not is_described:  # transformers writes the dtype in which the model is trained
        dtype = str(dtypes.default).removeprefix("torch.")
        _write_json(partial / CONFIG_FILE, _read_json(partial / CONFIG_FILE) | {"dtype": dtype})
    for name, content in model_files.items():
        if name != CONFIG_FILE or is_described:  # else keep the config written by transformers
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)


def copy_mode(example: Path, folder: Path) -> None:
    """Sets the mode of all files to that of `example`: safetensors creates private files."""
    mode = example.stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _training_file(folder: Path, name: str) -> Path:
    training = folder / TRAINING_FOLDER
    if training.is_dir():
        return training / name
    return folder / (LEGACY_OPTIMIZER_FILE if name == OPTIMIZER_FILE else name)


def _read_progress(folder: Path) -> Progress:
    record = _read_json(_training_file(folder, TRAINER_FILE))
    if (version := record.pop("format")) not in (*LEGACY_FORMATS, FORMAT):
        raise ModelError(f"checkpoint '{folder}' has format {version}, not {FORMAT}")
    if version in WITHOUT_COUNT:  # every batch made one optimiser update, or none
        record["optimizer_updates"] = record["policy_version"] - record["num_skipped"]
    updates = [
        Update(policy_version=update["policy_version"], lease_ids=tuple(update["lease_ids"]))
        for update in record.pop("recent_updates")
    ]
    return Progress(**record, recent_updates=tuple(updates))


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record), encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
