# pyright: reportMissingImports=false
"""Runs inside vLLM's workers: the weight receiver, as a weight-transfer engine of vLLM.

vLLM imports this module by the name of `WorkerExtension` before the model loads; importing it
registers the transfer engine.
"""

import os
import select
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from speed_async.actors.stepped_engine.frames import pack_error
from speed_async.actors.vllm_engine.options import TRANSFER_BACKEND
from speed_async.errors import SpeedAsyncError
from speed_async.types import WeightOffer
from speed_async.weight_sync.broadcast import TorchReceiver
from speed_async.weight_sync.channel import NamedTensor, TransferReport


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing: every offer says where to meet."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One offer, as it was made to this engine's first worker."""

    offer: dict[str, Any]


class ReceivingEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Takes part in one broadcast an update, each worker of the engine as a rank of its own.

    A failed transfer is no exception here, which would reach the actor as a bare text: `outcome`
    holds it. The model is touched when the first bucket is there, not earlier, so that a transfer
    that fails before leaves the old version whole.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        more_config: Any = self.vllm_config.additional_config
        has_core_above = self.parallel_config.distributed_executor_backend == "mp"
        end_with_actor(
            more_config["actor_process_id"],
            core_id=os.getppid() if has_core_above else None,
        )
        self._receiver = TorchReceiver(device=self.device)
        self._expected: list[NamedTensor] | None = None
        self._reloading = False
        self.outcome: dict[str, Any] = {}

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to prepare."""

    def start_weight_update(self) -> None:
        self.outcome = {}
        self._reloading = False

    def receive_weights(self, update_info: UpdateInfo) -> None:
        offer = WeightOffer(**update_info.offer)
        offer = replace(offer, rank=offer.rank + self.parallel_config.rank)
        try:
            report = self._receiver.receive(offer, self._expect(), self._load_bucket)
        except SpeedAsyncError as error:
            self.outcome = {"error": pack_error(error), "is_whole": not self._reloading}
        else:
            self.outcome = _told(report)

    def finish_weight_update(self) -> None:
        if not self._reloading:
            return
        finalize_layerwise_reload(self.model, self.model_config)
        self._refresh_tied_head()

    def shutdown(self) -> None:
        self._receiver.close()

    @torch.no_grad()
    def _load_bucket(self, tensors: Sequence[NamedTensor]) -> None:
        if not self._reloading:
            initialize_layerwise_reload(self.model)
            self._reloading = True
        model: Any = self.model
        # vLLM keeps what it is given until a layer is complete; the bucket is only lent.
        model.load_weights([(name, tensor.to(self.device, copy=True)) for name, tensor in tensors])

    def _expect(self) -> list[NamedTensor]:
        """Names, shapes and dtypes as the learner has them: of the model that Hugging Face makes
        of the same configuration, without its memory."""
        if self._expected is None:
            config = self.model_config.hf_config
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=self.model_config.dtype)
            self._expected = [(name, each.detach()) for name, each in model.named_parameters()]
        return self._expected

    def _refresh_tied_head(self) -> None:
        """vLLM's CPU build multiplies by a packed copy of the head, which a reload of the tied
        embedding does not reach."""
        head = getattr(self.model, "lm_head", None)
        tied = getattr(self.model_config.hf_config, "tie_word_embeddings", False)
        if tied and head is not None and self.device.type == "cpu":
            head.quant_method.process_weights_after_loading(head)


class WorkerExtension:
    """Methods that vLLM adds to its worker class, to be called by `collective_rpc`."""

    weight_transfer_engine: ReceivingEngine

    def transfer_outcome(self) -> dict[str, Any]:
        """How this worker's last transfer went: see `ReceivingEngine.outcome`."""
        return self.weight_transfer_engine.outcome


def end_with_actor(actor_id: int, *, core_id: int | None) -> None:
    """End this process, and vLLM's engine core above it, when the actor's process has ended: the
    core would wait for it for ever. `core_id` None: this process is the core."""

    def watch() -> None:
        try:
            actor = os.pidfd_open(actor_id)
        except ProcessLookupError:
            pass  # gone already
        else:
            select.select([actor], [], [])
        if core_id is not None and os.getppid() == core_id:
            os.kill(core_id, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-actor", daemon=True).start()


def _told(report: TransferReport) -> dict[str, Any]:
    canary = report.canary
    return {
        "error": None,
        "transfer_s": report.transfer_s,
        "num_bytes": report.num_bytes,
        "token_ids": list(canary.token_ids) if canary is not None else [],
        "logprobs": list(canary.logprobs) if canary is not None else [],
    }


WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, ReceivingEngine)
