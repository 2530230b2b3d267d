"""Checks a Hugging Face model folder and loads its model, tokenizer and context length."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from speed_async.actors.prompt_codec import NOT_ONE_TOKEN
from speed_async.errors import ConfigError, ModelError
from speed_async.weight_sync.device import DeviceChoice, resolve_device


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    model: Any  # transformers.PreTrainedModel, in eval mode
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    context_length: int
    """Prompt plus completion tokens of one sequence."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a completion."""


def load_model_folder(
    path: str | Path,
    *,
    context_length: int | None = None,
    device: DeviceChoice = "auto",
    dtype: torch.dtype | None = None,
    stop_tokens: Sequence[str] = (),
) -> LoadedModel:
    """Load a model folder onto a device ("auto": CUDA when available).

    `dtype` None means float32 on a CPU and the folder's own dtype on CUDA. `stop_tokens`: texts of
    tokens that end a completion besides EOS. Raises ModelError with the folder and the remedy, and
    ConfigError for a stop token that the model does not have.
    """
    folder = Path(path)
    check_model_folder(folder)
    from transformers import AutoModelForCausalLM  # slow import: after the cheap checks

    tokenizer = load_tokenizer(folder)
    target = resolve_device("actors.device", device)
    if dtype is None:
        dtype_choice: torch.dtype | str = torch.float32 if target.type == "cpu" else "auto"
    else:
        dtype_choice = dtype
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype_choice, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load model folder {folder}: {error}") from error
    model = model.to(target).eval().requires_grad_(False)
    length = usable_context(folder, model.config, context_length)
    check_attention(folder, model.config, length)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        context_length=length,
        eos_token_ids=eos_token_ids(model, tokenizer, stop_tokens),
    )


def check_model_folder(folder: Path) -> None:
    """Raises ModelError when the folder holds no model. Does not read the weights."""
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist: set model.path to a local folder")
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model folder {folder} has no config.json: it must be a folder written by "
            "save_pretrained or downloaded completely from a model hub"
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model folder {folder} has no *.safetensors file: download the weights, or convert "
            "other formats with model.save_pretrained(folder)"
        )


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises ModelError when it is missing or has no EOS token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model folder {folder} has no usable tokenizer ({error}): save one there with "
            "tokenizer.save_pretrained(folder)"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer in {folder} has no EOS token, so completions cannot stop: set "
            "eos_token in its tokenizer_config.json"
        )
    return tokenizer


def usable_context(folder: Path, config: Any, wanted: int | None) -> int:
    """Context length of the run. Raises ModelError when the model does not support `wanted`."""
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or wanted
    if limit is None:
        raise ModelError(f"config.json in {folder} has no context length: set model.context_length")
    if wanted is not None and wanted > limit:
        raise ModelError(
            f"model.context_length = {wanted}, but the model in {folder} supports {limit} tokens: "
            f"set at most {limit}"
        )
    return wanted or limit


def check_attention(folder: Path, config: Any, length: int) -> None:
    """Raises ModelError when the model has layers other than full attention.

    The torch engine passes one full causal mask to every layer.
    """
    text_config = config.get_text_config()
    window = getattr(text_config, "sliding_window", None)
    kinds = set(getattr(text_config, "layer_types", None) or ())
    if kinds and "sliding_attention" not in kinds:
        window = None
    if window is not None and window < length:
        raise ModelError(
            f"the model in {folder} uses a sliding window of {window} tokens, which the torch "
            f"engine does not support: set model.context_length to at most {window}, or "
            'engine = "vllm"'
        )
    others = kinds - {"full_attention", "sliding_attention"}
    if others:
        raise ModelError(
            f"the model in {folder} has layers of type {', '.join(sorted(others))}, which the "
            'torch engine does not support: use engine = "vllm"'
        )


def eos_token_ids(model: Any, tokenizer: Any, stop_tokens: Sequence[str] = ()) -> tuple[int, ...]:
    """Union of the EOS ids of generation config, model config and tokenizer, and of the stop
    tokens, ascending. Raises ConfigError for a stop token that is not one token."""
    found: set[int] = {int(tokenizer.eos_token_id)}
    for source in (getattr(model, "generation_config", None), model.config):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    for text in stop_tokens:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ConfigError("model.stop_tokens", text, NOT_ONE_TOKEN)
        found.update(ids)
    return tuple(sorted(found))
