"""Checkpoints: a Hugging Face model folder with the optimiser's state beside it, no pickles.

A checkpoint is written under a temporary name, flushed to disk, then renamed: under its final name
it is always whole. `latest`, in the folder of all checkpoints, names the newest.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from speed_async.errors import ModelError
from speed_async.learner.model import load_model
from speed_async.learner.optimizer import load_named_state
from speed_async.learner.parallel import FullState

FORMAT = 1
LATEST = "latest"
OPTIMIZER_FILE = "optimizer.safetensors"
TRAINER_FILE = "trainer.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    policy_version: int
    num_updates: int
    num_skipped: int
    extra: dict[str, object]
    """Plain data of the caller; must survive JSON."""


def save_checkpoint(
    folder: Path,
    *,
    model: PreTrainedModel,
    state: FullState,
    tokenizer_folder: Path,
    info: CheckpointInfo,
) -> Path:
    """Write `folder` whole or not at all, then point `latest` beside it to it; returns it.

    A checkpoint of the same name (of a lineage that was rolled back) is replaced.
    Raises OSError when the disk is full or not writable; the old state is then untouched.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    replaced = folder.with_name(f".{folder.name}.replaced")
    if replaced.exists() and not folder.exists():  # killed between the two renames below
        replaced.rename(folder)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    model.save_pretrained(partial, state_dict=state.model)
    for name in TOKENIZER_FILES:
        if (source := tokenizer_folder / name).is_file():
            shutil.copyfile(source, partial / name)
    optimizer = {key: value.detach().contiguous() for key, value in state.optimizer.items()}
    save_file(optimizer, partial / OPTIMIZER_FILE)
    record = {"format": FORMAT, **asdict(info)}
    (partial / TRAINER_FILE).write_text(json.dumps(record, indent=2), encoding="utf-8")
    _flush(partial)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    _flush_one(folder.parent)
    _point_latest(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint that `latest` names, or None when there is none.

    Raises ModelError when it names a folder that is gone.
    """
    pointer = root / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    for folder in (root / name, root / f".{name}.replaced"):  # killed while replacing it
        if (folder / TRAINER_FILE).is_file():
            return folder
    raise ModelError(f"'{pointer}' names checkpoint '{name}', which is not there: remove the file")


def load_checkpoint(
    folder: Path, *, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> CheckpointInfo:
    """Restore parameters and optimiser state bit for bit.

    Raises ModelError when the folder is no checkpoint, or one of another model.
    """
    try:
        record = json.loads((folder / TRAINER_FILE).read_text(encoding="utf-8"))
        if (version := record.pop("format")) != FORMAT:
            raise ModelError(f"checkpoint '{folder}' has format {version}, not {FORMAT}")
        info = CheckpointInfo(**record)
        saved = load_model(folder, device="cpu")
        model.load_state_dict(saved.state_dict())
        load_named_state(optimizer, model, load_file(folder / OPTIMIZER_FILE))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"checkpoint '{folder}' cannot be restored: {error}") from error
    return info


def _point_latest(folder: Path) -> None:
    pending = folder.with_name(f".{LATEST}.partial")
    pending.write_text(folder.name + "\n", encoding="utf-8")
    _flush_one(pending)
    pending.replace(folder.with_name(LATEST))
    _flush_one(folder.parent)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush_one(path)
    _flush_one(folder)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
