"""The files of a model folder beside its tensors, read at the start, saved with each checkpoint.

A checkpoint describes its model by the bytes that the first model was described by. Nothing is
serialised anew, so nothing can be refused or changed on the way, and the first model's folder may
change or vanish while the run goes on.
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
"""Configurations, tokenizers of all kinds, chat templates, code of the model's own."""
FOLDERS = ("additional_chat_templates",)
NOT_THE_MODEL = ("trainer.json", "random.json")
"""What a checkpoint of format 2 kept beside its model."""
CONFIG_FILE = "config.json"


def read_model_files(folder: Path) -> dict[str, bytes]:
    """Contents by name, relative to `folder`. Raises ModelError when a file cannot be read."""
    found: dict[str, bytes] = {}
    try:
        for place in (folder, *(folder / name for name in FOLDERS)):
            paths = sorted(place.iterdir()) if place.is_dir() else []
            for path in paths:
                if path.is_file() and _describes_the_model(path.name):
                    found[path.relative_to(folder).as_posix()] = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"model folder '{folder}': {error.filename} cannot be read ({error.strerror}), and "
            "every checkpoint needs it: give this user the right to read it"
        ) from error
    return found


def names_class(files: Mapping[str, bytes], model_class: str) -> bool:
    """Whether config.json is the one of this class: a model may be a part of what it describes."""
    try:
        return json.loads(files[CONFIG_FILE])["architectures"] == [model_class]
    except (KeyError, TypeError, ValueError):
        return False


def _describes_the_model(name: str) -> bool:
    is_wanted = name.endswith(SUFFIXES) or name.startswith(("vocab.", "LICENSE"))
    is_index = name.endswith(".index.json")  # of the shards that the tensors were read from
    return is_wanted and not is_index and name not in NOT_THE_MODEL and not name.startswith(".")
