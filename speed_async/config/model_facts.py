"""Read model properties from config.json, without torch or transformers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed_async.errors import ModelError

OTHER_NAMES = {
    "max_position_embeddings": ("n_positions", "max_sequence_length", "max_seq_len"),
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("n_head", "num_heads", "n_heads"),
}
"""Alternative names of these properties in some model families."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """Properties of a model; None if config.json leaves the value to the model class."""

    context_length: int | None = None
    """Prompt plus completion tokens of one sequence."""
    vocab_size: int | None = None
    """Rows of the embedding table."""
    hidden_size: int | None = None
    num_layers: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    dtype: str | None = None
    sliding_window: int | None = None
    """Attention window in tokens of the sliding window layers; None if all layers attend to all
    tokens."""
    layer_types: frozenset[str] = frozenset()
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """config.json, or the part that describes the language model."""

    @property
    def kv_values_per_token(self) -> int | None:
        """Numbers per token in the KV cache."""
        if self.num_layers is None or self.num_kv_heads is None or self.head_dim is None:
            return None
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def read_model_info(folder: str | Path) -> ModelInfo:
    """Read config.json. Raises ModelError if it is missing or does not describe a model."""
    record = read_json(Path(folder) / "config.json")
    if "model_type" not in record:
        raise ModelError(
            f"'{folder}/config.json' has no model_type: set model.path to a Hugging Face folder "
            "(saved with save_pretrained, or a complete download)"
        )
    text = record.get("text_config")
    text = text if isinstance(text, dict) else record
    heads, hidden = _number(text, "num_attention_heads"), _number(text, "hidden_size")
    head_dim = _number(text, "head_dim")
    if head_dim is None and heads and hidden:
        head_dim = hidden // heads
    kinds = text.get("layer_types")
    kinds = frozenset(map(str, kinds)) if isinstance(kinds, Sequence) else frozenset()
    window = _number(text, "sliding_window")
    if text.get("use_sliding_window") is False or (kinds and "sliding_attention" not in kinds):
        window = None
    dtype = text.get("dtype") or text.get("torch_dtype") or record.get("torch_dtype")
    return ModelInfo(
        context_length=_number(text, "max_position_embeddings"),
        vocab_size=_number(text, "vocab_size"),
        hidden_size=hidden,
        num_layers=_number(text, "num_hidden_layers"),
        num_kv_heads=_number(text, "num_key_value_heads") or heads,
        head_dim=head_dim,
        dtype=dtype if isinstance(dtype, str) else None,
        sliding_window=window,
        layer_types=kinds,
        record=text,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder. Raises ModelError."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read ({error.strerror})") from None
    except ValueError as error:
        hint = " (a Git LFS pointer: run `git lfs pull` there)" if is_lfs_pointer(path) else ""
        raise ModelError(f"'{path}' is not valid JSON{hint}: {error}") from None
    if not isinstance(record, dict):
        raise ModelError(f"'{path}' is not a JSON object")
    return record


def is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _number(record: Mapping[str, Any], name: str) -> int | None:
    for each in (name, *OTHER_NAMES.get(name, ())):
        value = record.get(each)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
