"""Loading the model to train, and the few things the learner asks of every family."""

from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from speed_async.errors import ConfigError, ModelError

CHECKPOINTING_PARAMETERS = 300_000_000
"""Models on a GPU from this size on recompute activations in the backward pass."""


def resolve_device(choice: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Raises ConfigError for "cuda" on a machine without one."""
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise ConfigError(
            "learner.device", choice, "no CUDA device is visible; use 'auto' or 'cpu'"
        )
    return torch.device("cuda" if available and choice != "cpu" else "cpu")


def stored_dtype(path: str | Path) -> torch.dtype:
    """Parameter type of the folder's own weights: what an actor on a GPU samples with."""
    dtype = AutoConfig.from_pretrained(path, local_files_only=True).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_model(
    path: str | Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    gradient_checkpointing: bool | None = None,
) -> PreTrainedModel:
    """Load a Hugging Face causal LM for training: float32 parameters, every dropout off.

    `gradient_checkpointing` None turns it on for large models on a GPU.
    Raises ModelError when the folder is missing, unreadable, or lacks some of its weights.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model folder '{folder}' has no config.json: set model.path to a Hugging Face folder"
        )
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model folder '{folder}' cannot be loaded: {error}") from error
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    absent = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
    if absent:
        raise ModelError(
            f"model folder '{folder}' lacks {len(absent)} of its weights, such as {absent[0]}"
        )
    target = resolve_device(device)
    nn.Module.to(model, target)
    if gradient_checkpointing is None:
        gradient_checkpointing = (
            target.type == "cuda" and model.num_parameters() >= CHECKPOINTING_PARAMETERS
        )
    _set_mode(model, gradient_checkpointing)
    return model


def _set_mode(model: PreTrainedModel, gradient_checkpointing: bool) -> None:
    """Evaluation mode, so that pi is what the engine samples from: dropout would change rho."""
    model.eval()
    if not gradient_checkpointing:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # this flag alone, not its children's: their dropout stays off
            if isinstance(getattr(module, "dropout", None), float):
                setattr(module, "dropout", 0.0)  # noqa: B010 - a float, where the class says Module


def context_length(model: PreTrainedModel, wanted: int | None) -> int | None:
    """Prompt plus completion tokens that actors sample at most: `model.context_length`, or the
    model's own limit. None for a model without one."""
    return wanted or getattr(model.config.get_text_config(), "max_position_embeddings", None)


def embedding_table(model: PreTrainedModel) -> Tensor:
    """Input embeddings (token ids, H): its first dimension bounds the ids that may be fed."""
    return cast(Tensor, model.get_input_embeddings().weight)


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The head from H to V. Raises ModelError for a model without one."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{type(model).__name__} has no linear language-model head")
    return head
