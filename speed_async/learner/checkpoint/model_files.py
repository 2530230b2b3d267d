"""The files of a model folder other than tensors, read at the start, saved with each checkpoint.

A checkpoint contains the exact bytes of the initial model's files. Nothing is serialised again, so
no setting can be rejected or changed. The folder of the initial model may change or be deleted
during the run.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from speed_async.errors import ModelError

SUFFIXES = (
    ".json",
    ".jinja",
    ".model",
    ".tiktoken",
    ".txt",
    ".py",
    ".bpe",
    ".spm",
    ".vocab",
    ".codes",
)
"""Configurations, tokenizers, chat templates and custom model code."""
FOLDERS = ("additional_chat_templates",)
LEGACY_TRAINING_FILES = ("trainer.json", "random.json")
"""Training state that a checkpoint of format 2 has next to its model."""
LEGACY_OPTIMIZER_FILE = "optimizer.safetensors"
"""Optimiser tensors that a checkpoint of format 2 has next to its model."""
CONFIG_FILE = "config.json"


def read_model_files(folder: Path) -> dict[str, bytes]:
    """Contents by name, relative to `folder`. Raises ModelError when a file cannot be read."""
    found: dict[str, bytes] = {}
    try:
        for directory in (folder, *(folder / name for name in FOLDERS)):
            paths = sorted(directory.iterdir()) if directory.is_dir() else []
            for path in paths:
                if path.is_file() and _is_model_file(path.name):
                    found[path.relative_to(folder).as_posix()] = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"model folder '{folder}': {error.filename} cannot be read ({error.strerror}), and "
            "every checkpoint needs it: give this user permission to read it"
        ) from error
    return found


def declares_class(files: Mapping[str, bytes], model_class: str) -> bool:
    """Whether config.json declares this class. It may describe a larger model, of which only a part
    is trained."""
    try:
        return json.loads(files[CONFIG_FILE])["architectures"] == [model_class]
    except (KeyError, TypeError, ValueError):
        return False


def _is_model_file(name: str) -> bool:
    is_wanted = name.endswith(SUFFIXES) or name.startswith(("vocab.", "LICENSE"))
    is_index = name.endswith(".index.json")  # index of the original weight shards
    return (
        is_wanted
        and not is_index
        and name not in LEGACY_TRAINING_FILES
        and not name.startswith(".")
    )
