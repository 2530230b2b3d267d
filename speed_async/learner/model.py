"""Model loading, and the properties that the learner requires of every model family."""

import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from speed_async.config.sections.learner import ActivationCheckpointing
from speed_async.errors import ModelError
from speed_async.learner.limits import resolved_checkpointing
from speed_async.weight_sync.device import DeviceChoice, resolve_device

MAX_COMPILED_KINDS = 64


def load_model(
    path: str | Path,
    *,
    device: DeviceChoice = "auto",
    activation_checkpointing: ActivationCheckpointing = "auto",
    on_cpu: bool = False,
) -> PreTrainedModel:
    """Loads a Hugging Face causal LM for training, with float32 parameters and without dropout.

    `on_cpu` leaves the parameters on the CPU, for a later move to `device`.
    Raises ModelError when the folder is missing or unreadable, or when weights are missing.
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
    missing = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
    if missing:
        raise ModelError(
            f"model folder '{folder}' lacks {len(missing)} weights, such as {missing[0]}"
        )
    target = resolve_device("learner.device", device)
    if not on_cpu:
        nn.Module.to(model, target)
    _set_mode(model, activation_checkpointing, on_gpu=target.type == "cuda")
    return model


def empty_model(
    path: str | Path,
    *,
    device: DeviceChoice = "auto",
    activation_checkpointing: ActivationCheckpointing = "auto",
) -> PreTrainedModel:
    """The model that `load_model` returns for this folder, without values: all tensors are on the
    meta device. Followers get the values of rank 0 when the model is sharded.

    Raises ModelError when the folder is missing or unreadable.
    """
    try:
        config = AutoConfig.from_pretrained(Path(path), local_files_only=True)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"model folder '{path}' cannot be loaded: {error}") from error
    on_gpu = resolve_device("learner.device", device).type == "cuda"
    _set_mode(model, activation_checkpointing, on_gpu=on_gpu)
    return model


def _set_mode(model: PreTrainedModel, choice: ActivationCheckpointing, *, on_gpu: bool) -> None:
    """Sets evaluation mode, so that pi matches the policy of the engine: dropout would change
    rho."""
    model.eval()
    for module in model.modules():
        if hasattr(module, "_apply_gate"):  # experts that are one tensor, in transformers
            module.forward = partial(_forward_experts, weakref.ref(module))
    checkpointing = resolved_checkpointing(choice, model.num_parameters(), on_gpu=on_gpu)
    if checkpointing == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if checkpointing == "selective":
        options["context_fn"] = partial(
            create_selective_checkpoint_contexts, list(_expensive_operators())
        )
    model.gradient_checkpointing_enable(options)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # not recursive: dropout of the children stays off
            if isinstance(getattr(module, "dropout", None), float):
                setattr(module, "dropout", 0.0)  # noqa: B010 - a float, annotated as Module


def _forward_experts(
    reference: "weakref.ReferenceType[nn.Module]", *args: Any, **kwargs: Any
) -> Any:
    """The forward pass with the weights in the dtype of autocast, which does not apply to the
    products of experts that are one tensor. Gradients have the dtype of the parameters."""
    module = reference()
    assert module is not None
    parameters = dict(module.named_parameters(recurse=False))
    device_type = next(iter(parameters.values())).device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        others = {name: each.to(dtype) for name, each in parameters.items() if each.dtype != dtype}
        if others:
            return functional_call(module, others, args, kwargs)  # calls this once more
    return type(module).forward(module, *args, **kwargs)


def _expensive_operators() -> Iterator[Any]:
    """Matrix products and attention: their results take little memory for the time they take."""
    aten = torch.ops.aten
    for name in (
        *("mm", "addmm", "_grouped_mm"),  # not bmm: attention without SDPA, quadratic in length
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ):
        if hasattr(aten, name):  # not all of them in every version
            yield getattr(aten, name).default


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers. Empty for a family that does not name their class."""
    classes = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in classes]


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compiles each decoder layer at its first call, for rows of any number and length. Layers of
    equal form share the results, one for each kind of call.

    Raises ModelError for a family that does not name its layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} does not name its decoder layers: set learner.compile to false"
        )
    from torch._dynamo import config as dynamo  # slow import

    # With and without gradient, mask, adapters; torch's limit of 8 would leave some uncompiled.
    dynamo.recompile_limit = MAX_COMPILED_KINDS
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)


def context_length(model: PreTrainedModel, configured: int | None) -> int | None:
    """Largest number of prompt plus completion tokens: `configured` (`model.context_length`), or
    the limit of the model. None for a model without a limit."""
    return configured or getattr(model.config.get_text_config(), "max_position_embeddings", None)


def embedding_table(model: PreTrainedModel) -> Tensor:
    """Input embeddings (token ids, H). The first dimension bounds the valid token ids."""
    return cast(Tensor, model.get_input_embeddings().weight)


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The language-model head from H to V. Raises ModelError for a model without one."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{type(model).__name__} has no linear language-model head")
    return head
