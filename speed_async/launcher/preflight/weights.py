"""Checks that all weight files of a model folder are present and complete. Reads headers only."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_async.config.model_facts import is_lfs_pointer, read_json
from speed_async.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    num_parameters: int
    num_bytes: int


def read_weights(folder: Path) -> tuple[Weights | None, list[ModelError]]:
    """Return the sizes of all weights, and an error for each missing or damaged file."""
    try:
        files, named = _files(folder)
    except ModelError as error:
        return None, [error]
    errors: list[ModelError] = []
    tensors: dict[str, tuple[int, int]] = {}
    for path in files:
        try:
            tensors |= _tensors(path)
        except ModelError as error:
            errors.append(error)
    absent = named - tensors.keys()
    if absent and not errors:
        errors.append(
            ModelError(
                f"model folder '{folder}': its files lack {len(absent)} of the weights that "
                f"{INDEX} names, such as '{min(absent)}'; download it again"
            )
        )
    if errors:
        return None, errors
    return Weights(
        num_parameters=sum(count for count, _ in tensors.values()),
        num_bytes=sum(size for _, size in tensors.values()),
    ), []


def _files(folder: Path) -> tuple[list[Path], set[str]]:
    """Files that a loader reads, and the names of the weights they must contain (if indexed)."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS], set()
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        found = f" ({', '.join(others[:3])}: not a name that loaders recognise)" if others else ""
        raise ModelError(
            f"model folder '{folder}' has neither {WEIGHTS} nor {INDEX}{found}: download the "
            "weights, or convert others with model.save_pretrained(folder)"
        )
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"'{folder / INDEX}' has no weight_map; download it again")
    names = sorted(set(map(str, places.values())))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"model folder '{folder}' lacks {len(missing)} of the {len(names)} files that {INDEX} "
            f"names: {', '.join(missing[:5])}; download them"
        )
    return [folder / name for name in names], set(places)


def _tensors(path: Path) -> dict[str, tuple[int, int]]:
    """Number of elements and bytes of each tensor in a safetensors file. Raises ModelError."""
    size = path.stat().st_size
    try:
        header, data_begins = _header(path)
        found = {
            name: (math.prod(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        ends = [
            entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
        ]
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        reason = "a Git LFS pointer: run `git lfs pull` there" if is_lfs_pointer(path) else error
        raise ModelError(f"weights file '{path}' cannot be read ({reason})") from None
    expected = data_begins + max(ends, default=0)
    if size != expected:
        raise ModelError(
            f"weights file '{path}' has {size:,} bytes, and its header requires {expected:,}: it "
            "is damaged or incompletely downloaded; download it again"
        )
    return found


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= MAX_HEADER_BYTES:
            raise ValueError("it has no safetensors header")
        return json.loads(file.read(length)), 8 + length
