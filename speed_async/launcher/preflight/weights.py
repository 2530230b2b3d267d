"""Checks that all weight files of a model folder are present and complete. Reads headers only."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_async.config.model_facts import is_lfs_pointer, read_json
from speed_async.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library."""
CHUNK_BYTES = 1 << 24
"""Tensors are compared in parts of this size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor as the header of its file describes it."""

    file: Path
    dtype: str
    """Its name in safetensors, such as BF16."""
    shape: tuple[int, ...]
    first_byte: int
    """Position of its values in the file."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    tensors: Mapping[str, StoredTensor]

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> str | None:
        """Of most parameters, as `StoredTensor.dtype`; None without tensors."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.dtype] += math.prod(tensor.shape)
        return counts.most_common(1)[0][0] if counts else None


def read_weights(folder: Path) -> tuple[Weights | None, list[ModelError]]:
    """Return the headers of all weights, and an error for each missing or damaged file."""
    try:
        files, named = _files(folder)
    except ModelError as error:
        return None, [error]
    errors: list[ModelError] = []
    tensors: dict[str, StoredTensor] = {}
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
    return Weights(tensors=tensors), []


def have_equal_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes. Reads up to the first difference.
    Raises OSError."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.first_byte)
        other.seek(second.first_byte)
        for begin in range(0, first.num_bytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, first.num_bytes - begin)
            if one.read(size) != other.read(size):
                return False
    return True


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


def _tensors(path: Path) -> dict[str, StoredTensor]:
    """Each tensor in a safetensors file. Raises ModelError."""
    size = path.stat().st_size
    try:
        header, data_begins = _header(path)
        found = {
            name: StoredTensor(
                file=path,
                dtype=str(entry["dtype"]),
                shape=tuple(map(int, entry["shape"])),
                first_byte=data_begins + entry["data_offsets"][0],
                num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        reason = "a Git LFS pointer: run `git lfs pull` there" if is_lfs_pointer(path) else error
        raise ModelError(f"weights file '{path}' cannot be read ({reason})") from None
    ends = (tensor.first_byte + tensor.num_bytes for tensor in found.values())
    expected = max(ends, default=data_begins)
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
