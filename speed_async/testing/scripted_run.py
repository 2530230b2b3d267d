"""The scripted engine for whole runs: random completions, and weights that are received only.

It takes part in broadcasts like any engine and receives into tensors with the names and shapes of
a real model. The weights are not used, so the canary is not checked.
"""

import random
import time
from collections.abc import Sequence

import torch

from speed_async.actors.engine import GenerationRequest
from speed_async.actors.model_folder import load_model_folder
from speed_async.actors.stepped_engine.stepper import FinishedRequest
from speed_async.config.local_model import model_folder
from speed_async.config.sections.actors import ActorsConfig
from speed_async.config.sections.model import ModelConfig
from speed_async.errors import WeightSyncError
from speed_async.testing.scripted_engine import Script, ScriptedStepper
from speed_async.types import WeightOffer
from speed_async.weight_sync.broadcast import TorchReceiver
from speed_async.weight_sync.buckets import flatten_parameters
from speed_async.weight_sync.channel import NamedTensor, WeightReceiver

STEP_S = 0.004
"""Duration of a step, similar to that of a model, which leaves CPU time to other processes."""


class PacedStepper(ScriptedStepper):
    def step(self) -> list[FinishedRequest]:
        time.sleep(STEP_S)
        return super().step()


def load_scripted_stepper(model: ModelConfig, actors: ActorsConfig, *, seed: int) -> PacedStepper:
    """A stepper that samples random token ids from this model's vocabulary.

    Raises ModelError when the folder is unusable. Sets the number of torch threads of this process.
    """
    torch.set_num_threads(1)
    loaded = load_model_folder(
        model_folder(model.path), context_length=model.context_length, device=actors.device
    )
    flatten_parameters(loaded.model)
    parameters = {name: value.detach() for name, value in loaded.model.named_parameters()}
    device = next(iter(parameters.values())).device
    weights = DiscardedWeights(parameters, TorchReceiver(device=device, in_place=True))
    num_token_ids = loaded.model.get_input_embeddings().weight.shape[0]
    return PacedStepper(
        random_script(random.Random(seed), num_token_ids),
        num_slots=actors.num_slots,
        context_length=loaded.context_length,
        num_token_ids=num_token_ids,
        receive=weights.receive,
        has_valid_weights=lambda: weights.has_valid_weights,
    )


def random_script(rng: random.Random, num_token_ids: int) -> Script:
    """Random scripts: between one token and the limit of the request, uniform over token ids."""

    def script(request: GenerationRequest, _: int) -> list[int]:
        return rng.choices(range(num_token_ids), k=rng.randint(1, request.max_new_tokens))

    return script


class DiscardedWeights:
    """Receives the tensors of each version without using them."""

    def __init__(self, tensors: dict[str, torch.Tensor], receiver: WeightReceiver) -> None:
        self.tensors = tensors
        self.has_valid_weights = True
        """False after a transfer that failed when some bytes had been written."""
        self._receiver = receiver

    def receive(self, offer: WeightOffer) -> float:
        """Take part in one broadcast; returns its seconds.

        Raises WeightSyncError or DeadlineExceeded.
        """
        missing = set(self.tensors)

        def copy_bucket(bucket: Sequence[NamedTensor]) -> None:
            self.has_valid_weights = False
            for name, tensor in bucket:
                self.tensors[name].copy_(tensor)
                missing.discard(name)

        report = self._receiver.receive(offer, [*self.tensors.items()], copy_bucket)
        if missing:
            raise WeightSyncError(
                f"policy version {offer.policy_version} lacks {len(missing)} of "
                f"{len(self.tensors)} tensors, first {min(missing)}"
            )
        self.has_valid_weights = True
        return report.transfer_s
