"""Creates the stepper of the embedded engine from a model folder and the configuration."""

import torch

from speed_async.actors.model_folder import load_model_folder
from speed_async.actors.torch_engine.generator import TorchGenerator
from speed_async.config.local_model import model_folder
from speed_async.config.sections.actors import ActorsConfig
from speed_async.config.sections.model import ModelConfig
from speed_async.weight_sync.broadcast import TorchReceiver
from speed_async.weight_sync.buckets import flatten_parameters
from speed_async.weight_sync.device import resolve_device


def load_torch_generator(
    model: ModelConfig,
    actors: ActorsConfig,
    *,
    seed: int,
    dtype: torch.dtype | None = None,
    canary_tolerance: float | None = None,
) -> TorchGenerator:
    """Load the model and prepare to receive weights.

    Raises ModelError when the folder is unusable. Sets the number of torch threads of this process.
    """
    device = resolve_device("actors.device", actors.device)
    if device.type == "cpu":
        torch.set_num_threads(actors.num_threads)
    loaded = load_model_folder(
        model_folder(model.path),
        context_length=model.context_length,
        device=actors.device,
        dtype=dtype,
        stop_tokens=model.stop_tokens,
    )
    flatten_parameters(loaded.model)  # same layout as the learner's: weights are received in place
    return TorchGenerator(
        loaded.model,
        num_slots=actors.num_slots,
        context_length=loaded.context_length,
        eos_token_ids=loaded.eos_token_ids,
        random=torch.Generator(device).manual_seed(seed),
        receiver=TorchReceiver(device=device, in_place=True),
        recompute_at_update=actors.running_at_update == "recompute",
        canary_tolerance=canary_tolerance,
    )
