"""The scripted engine in a whole run: completions drawn from a seed, weights that are only kept.

It takes part in broadcasts like any engine, and the bytes arrive in tensors of a real model's names
and shapes. Nothing is ever evaluated with them, so there is no canary to measure.
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from speed_async.actors.engine import GenerationRequest
from speed_async.actors.model_folder import load_model_folder
from speed_async.actors.stepped_engine.stepper import Finished
from speed_async.config.schema import ActorsConfig, ModelConfig
from speed_async.errors import WeightSyncError
from speed_async.testing.scripted_engine import Script, ScriptedStepper
from speed_async.types import WeightOffer
from speed_async.weight_sync.broadcast import TorchReceiver
from speed_async.weight_sync.channel import NamedTensor, WeightReceiver
from speed_async.weight_sync.contiguous import flatten_parameters

STEP_S = 0.004
"""A step takes this long, as a model's would: the rest of the machine has room to work."""


class PacedStepper(ScriptedStepper):
    def step(self) -> list[Finished]:
        time.sleep(STEP_S)
        return super().step()


def load_scripted_stepper(model: ModelConfig, actors: ActorsConfig, *, seed: int) -> PacedStepper:
    """A stepper that draws token ids of this model's vocabulary, a few for each completion.

    Raises ModelError when the folder cannot serve. Sets this process's torch threads.
    """
    torch.set_num_threads(1)
    loaded = load_model_folder(
        Path(model.path), context_length=model.context_length, device=actors.device
    )
    flatten_parameters(loaded.model)
    parameters = {name: value.detach() for name, value in loaded.model.named_parameters()}
    device = next(iter(parameters.values())).device
    weights = DiscardedWeights(parameters, TorchReceiver(device=device, in_place=True))
    num_token_ids = loaded.model.get_input_embeddings().weight.shape[0]
    return PacedStepper(
        drawn_script(random.Random(seed), num_token_ids),
        num_slots=actors.slots,
        context_length=loaded.context_length,
        num_token_ids=num_token_ids,
        receive=weights.receive,
        is_whole=lambda: weights.is_whole,
    )


def drawn_script(rng: random.Random, num_token_ids: int) -> Script:
    """Between one token and the limit of the request, each any of the vocabulary."""

    def script(request: GenerationRequest, _: int) -> list[int]:
        return rng.choices(range(num_token_ids), k=rng.randint(1, request.max_new_tokens))

    return script


class DiscardedWeights:
    """The newest version's tensors, received and never used."""

    def __init__(self, tensors: dict[str, torch.Tensor], receiver: WeightReceiver) -> None:
        self.tensors = tensors
        self.is_whole = True
        """False after a transfer that broke off when some bytes had been written."""
        self._receiver = receiver

    def receive(self, offer: WeightOffer) -> float:
        """Take part in one broadcast; its seconds. Raises WeightSyncError or DeadlineExceeded."""
        missing = set(self.tensors)

        def copy_bucket(bucket: Sequence[NamedTensor]) -> None:
            self.is_whole = False
            for name, tensor in bucket:
                self.tensors[name].copy_(tensor)
                missing.discard(name)

        report = self._receiver.receive(offer, [*self.tensors.items()], copy_bucket)
        if missing:
            raise WeightSyncError(
                f"policy version {offer.policy_version} came without {len(missing)} of "
                f"{len(self.tensors)} tensors, first {min(missing)}"
            )
        self.is_whole = True
        return report.transfer_s
