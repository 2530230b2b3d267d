"""One checkpoint: a Hugging Face model folder with all else that training goes on from beside it.

Written under a temporary name, sealed with checksums (checksums.py), then renamed: under its final
name it is always whole. What it holds besides the model: the optimiser's tensors, the random
states of the process, and the learner's progress. The learning rate is no state: it follows from
the number of updates (`warmed_up_lr`). No pickles.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from speed_async.config.whole_file import flush
from speed_async.errors import ModelError
from speed_async.learner.checksums import damage, seal
from speed_async.learner.model import load_model
from speed_async.learner.optimizer import load_named_state
from speed_async.learner.parallel import FullState
from speed_async.learner.progress import Progress, Update
from speed_async.learner.random_states import random_states, restore_random_states
from speed_async.learner.shelf import TRAINER_FILE, put, tidy

FORMAT = 2
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.json"
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


def save_checkpoint(
    folder: Path,
    *,
    model: PreTrainedModel,
    state: FullState,
    tokenizer_folder: Path,
    progress: Progress,
) -> None:
    """Write `folder` whole or not at all; one of the same name is replaced.

    Raises OSError when the disk is full or not writable: what was there before is then untouched.
    """
    if not folder.parent.is_dir():
        folder.parent.mkdir(parents=True)
        flush(folder.parent.parent)
    tidy(folder.parent)
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir()
    try:
        model.save_pretrained(partial, state_dict=state.model)
        for name in TOKENIZER_FILES:
            if (source := tokenizer_folder / name).is_file():
                shutil.copyfile(source, partial / name)
        optimizer = {key: value.detach().contiguous() for key, value in state.optimizer.items()}
        save_file(optimizer, partial / OPTIMIZER_FILE)
        _write_json(partial / RANDOM_FILE, random_states())
        _write_json(partial / TRAINER_FILE, {"format": FORMAT, **asdict(progress)})
        seal(partial)
        put(partial, folder)
    except SafetensorError as error:  # its writer's own word for a full disk
        raise OSError(f"checkpoint '{folder}' cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gives a full disk its room back


def load_checkpoint(
    folder: Path,
    *,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    is_whole: bool = False,
) -> Progress:
    """Restore parameters, optimiser and random states bit for bit.

    `is_whole`: its checksums were compared just now (`newest_whole`), and need not be again.
    Raises ModelError when the folder is no checkpoint, a damaged one, or one of another model.
    """
    if not is_whole and (what := damage(folder)):
        raise ModelError(f"checkpoint '{folder}' cannot be restored: {what}")
    try:
        progress = _read_progress(folder)
        saved = load_model(folder, device="cpu")
        model.load_state_dict(saved.state_dict())
        load_named_state(optimizer, model, load_file(folder / OPTIMIZER_FILE))
        restore_random_states(_read_json(folder / RANDOM_FILE))  # last: loading draws numbers
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"checkpoint '{folder}' cannot be restored: {error}") from error
    return progress


def _read_progress(folder: Path) -> Progress:
    record = _read_json(folder / TRAINER_FILE)
    if (version := record.pop("format")) != FORMAT:
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
