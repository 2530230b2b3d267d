"""The embedded engine: a model folder, the slot generator and the asynchronous shell, wired."""

import time
from pathlib import Path

import torch

from speed_async.actors.model_folder import LoadedModel, load_model_folder
from speed_async.actors.stepped_engine import Clock, SteppedEngine
from speed_async.actors.torch_generator import TorchGenerator
from speed_async.config.schema import ActorsConfig, ModelConfig
from speed_async.weights.channel import WeightReceiver


class TorchEngine(SteppedEngine):
    """Implements `Engine` over the model of a folder. Entering loads it, in the engine thread.

    Entering raises ModelError when the folder cannot serve. Weights arrive through `receiver`,
    which is called in the engine thread; None makes every update a WeightSyncError.
    """

    loaded: LoadedModel
    """Set on entering: model (owned by the engine), tokenizer, context length, EOS ids."""

    def __init__(
        self,
        model: ModelConfig,
        actors: ActorsConfig,
        *,
        seed: int,
        receiver: WeightReceiver | None = None,
        dtype: torch.dtype | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(self._load, clock=clock)
        self._model = model
        self._actors = actors
        self._seed = seed
        self._receiver = receiver
        self._dtype = dtype

    def _load(self) -> TorchGenerator:
        self.loaded = load_model_folder(
            Path(self._model.path),
            context_length=self._model.context_length,
            device=self._actors.device,
            dtype=self._dtype,
        )
        device = self.loaded.model.device
        if device.type == "cpu":
            torch.set_num_threads(self._actors.num_threads)
        return TorchGenerator(
            self.loaded.model,
            num_slots=self._actors.slots,
            context_length=self.loaded.context_length,
            eos_token_ids=self.loaded.eos_token_ids,
            random=torch.Generator(device).manual_seed(self._seed),
            receiver=self._receiver,
        )
