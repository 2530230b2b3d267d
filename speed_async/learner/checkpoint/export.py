"""Export of a checkpoint: a Hugging Face model folder without the training state."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from speed_async.errors import ModelError, SpeedAsyncError
from speed_async.learner.adapters import is_factor
from speed_async.learner.checkpoint.best import LINK_PREFIX
from speed_async.learner.checkpoint.captured import MASTER
from speed_async.learner.checkpoint.checksums import CHECKSUM_FILE, damage
from speed_async.learner.checkpoint.dtypes import WeightDtypes
from speed_async.learner.checkpoint.files import copy_mode, write_model
from speed_async.learner.checkpoint.model_files import (
    CONFIG_FILE,
    LEGACY_OPTIMIZER_FILE,
    LEGACY_TRAINING_FILES,
    read_model_files,
)
from speed_async.learner.checkpoint.shards import SavedRows, load_weights, saved_paths
from speed_async.learner.checkpoint.store import (
    TRAINING_FOLDER,
    checkpoint_folder,
    kept_versions,
)
from speed_async.learner.model import load_model

TRAINING_STATE = (
    TRAINING_FOLDER,
    CHECKSUM_FILE,
    LEGACY_OPTIMIZER_FILE,
    *LEGACY_TRAINING_FILES,
)
"""Names in a checkpoint that are not of its model."""


def find_checkpoint(source: Path, name: str | None) -> Path:
    """The checkpoint `source`; or of the run folder `source`, that of this version or of the best
    evaluation of this suite, by default the newest one.

    Raises SpeedAsyncError with the checkpoints that exist.
    """
    root = source / "checkpoints"
    if not root.is_dir():
        if name is not None:
            raise SpeedAsyncError(f"'{source}' is not a run folder: --checkpoint needs one")
        return source
    versions = kept_versions(root)
    if name is None and versions:
        return checkpoint_folder(root, versions[-1])
    if name is not None:
        wanted = checkpoint_folder(root, int(name)) if name.isdecimal() else root / name
        if wanted.is_dir():
            return wanted.resolve()
    best = sorted(path.name for path in root.glob(f"{LINK_PREFIX}*"))
    existing = ", ".join([*map(str, versions), *best]) or "none yet"
    raise SpeedAsyncError(f"'{root}' has no checkpoint '{name}'; there are: {existing}")


def export(checkpoint: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Writes the model of `checkpoint` to `out`, which must not exist, under a temporary name
    first. With `dtype` None the files are copied; otherwise all weights are converted, from the
    float32 values that training had. With adapters, from the merged weights in the checkpoint,
    which have the dtype of the initial model.

    Raises ModelError for a damaged checkpoint, SpeedAsyncError if `out` exists, and OSError.
    """
    check_export(checkpoint, out)
    with new_folder(out) as partial:
        if dtype is None:
            omitted = shutil.ignore_patterns(*TRAINING_STATE)
            shutil.copytree(checkpoint, partial, ignore=omitted, dirs_exist_ok=True)
        else:
            _write_converted(checkpoint, partial, dtype)


def check_export(checkpoint: Path, out: Path) -> None:
    """Raises ModelError for a damaged checkpoint, and SpeedAsyncError if `out` exists."""
    if what := damage(checkpoint):
        raise ModelError(f"checkpoint '{checkpoint}' cannot be exported: {what}")
    if out.exists():
        raise SpeedAsyncError(f"'{out}' exists already: choose another --out, or remove it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder with a temporary name, which becomes `out` unless an error is raised; then it
    is removed. Raises OSError, also for errors of copying and of safetensors on a full disk."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except shutil.Error as error:  # a list of (from, to, reason)
        raise OSError(error.args[0][0][2]) from error
    except SafetensorError as error:  # raised by the safetensors writer on a full disk
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_converted(checkpoint: Path, out: Path, dtype: torch.dtype) -> None:
    try:
        model = load_model(checkpoint, device="cpu")  # float32
        saved = SavedRows(saved_paths(checkpoint / TRAINING_FOLDER, MASTER))
        if not any(map(is_factor, saved.names())):  # adapters are merged in the model's files
            load_weights(model, saved)
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"checkpoint '{checkpoint}' cannot be exported: {error}") from error
    largest = max(float(parameter.detach().abs().max()) for parameter in model.parameters())
    if largest > torch.finfo(dtype).max:
        raise ModelError(f"weights up to {largest:.3g} exceed {dtype}: choose another --dtype")
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    dtypes = WeightDtypes(by_name=buffers, default=dtype)
    write_model(out, model, model.state_dict(), read_model_files(checkpoint), dtypes)
    config = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the older name
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_mode(out / CONFIG_FILE, out)
