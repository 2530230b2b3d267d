# pyright: reportMissingImports=false
"""The weight receiver as a weight-transfer engine of vLLM. Runs in vLLM's worker processes.

vLLM imports this module, via `WorkerExtension`, before the model loads. The import registers the
transfer engine.
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
from speed_async.actors.vllm_engine.held_weights import EXPERTS_METHOD, LoadTrace, verify_held
from speed_async.actors.vllm_engine.options import TRANSFER_BACKEND
from speed_async.errors import SpeedAsyncError
from speed_async.types import WeightOffer
from speed_async.weight_sync.broadcast import TorchReceiver
from speed_async.weight_sync.channel import NamedTensor, TransferReport
from speed_async.weight_sync.digests import tensor_digests, verify_digests


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Empty: every offer contains the address of the store."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One offer, with the rank of this engine's first worker."""

    offer: dict[str, Any]


class ReceivingEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Takes part in one broadcast per update; each worker of the engine has its own rank.

    A failed transfer is stored in `outcome` instead of raised, because vLLM forwards only the text
    of an exception. The model is modified only after the first bucket has arrived, so a transfer
    that fails earlier leaves the old version intact. After the last bucket, what was received is
    compared with the learner's digests, and what the model holds with what was received.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        additional_config: Any = self.vllm_config.additional_config
        has_core_parent = self.parallel_config.distributed_executor_backend == "mp"
        exit_with_actor(
            additional_config["actor_process_id"],
            core_id=os.getppid() if has_core_parent else None,
        )
        self._receiver = TorchReceiver(device=self.device)
        self._expected: list[NamedTensor] | None = None
        self._trace: LoadTrace | None = None  # None until an update changes the model
        self._digests: dict[str, int] = {}
        self.outcome: dict[str, Any] = {}

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """No initialisation required."""

    def start_weight_update(self) -> None:
        self.outcome = {}
        self._digests = {}
        self._trace = None

    def receive_weights(self, update_info: UpdateInfo) -> None:
        offer = WeightOffer(**update_info.offer)
        offer = replace(offer, rank=offer.rank + self.parallel_config.rank)
        version = offer.policy_version
        try:
            report = self._receiver.receive(offer, self._expect(), self._load_bucket)
            verify_digests(report.digests, self._digests, policy_version=version)
            assert self._trace is not None  # a broadcast has at least one bucket
            self._finish_reload()
            untraced = verify_held(self.model, self._trace, policy_version=version)
            self._pack_experts()
        except SpeedAsyncError as error:
            self.outcome = {"error": pack_error(error), "is_whole": self._trace is None}
        else:
            self.outcome = _completed_outcome(report, self._trace, untraced)

    def finish_weight_update(self) -> None:
        """Ends a reload that failed."""
        if self.outcome["error"] and self._trace is not None:
            self._finish_reload()

    def shutdown(self) -> None:
        self._receiver.close()

    @torch.no_grad()
    def _load_bucket(self, tensors: Sequence[NamedTensor]) -> None:
        if self._trace is None:
            initialize_layerwise_reload(self.model)
            self._trace = LoadTrace(self.model)
        # vLLM keeps the tensors until a layer is complete; the bucket is valid in this call only.
        copies = [(name, tensor.to(self.device, copy=True)) for name, tensor in tensors]
        self._digests |= tensor_digests(copies)
        self._trace.load(self.model, copies)

    def _finish_reload(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._refresh_tied_head()

    def _expect(self) -> list[NamedTensor]:
        """Names, shapes and dtypes of the learner's parameters.

        Taken from the Hugging Face model of the same configuration, on the meta device.
        """
        if self._expected is None:
            config = self.model_config.hf_config
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=self.model_config.dtype)
            self._expected = [(name, each.detach()) for name, each in model.named_parameters()]
        return self._expected

    def _refresh_tied_head(self) -> None:
        """Refresh the packed copy of a tied head on a CPU, which a reload does not update."""
        head = getattr(self.model, "lm_head", None)
        tied = getattr(self.model_config.hf_config, "tie_word_embeddings", False)
        if tied and head is not None and self.device.type == "cpu":
            head.quant_method.process_weights_after_loading(head)

    def _pack_experts(self) -> None:
        """Pack experts on a CPU. vLLM does so only after the first load."""
        if self.device.type != "cpu":
            return
        for module in self.model.modules():
            method: Any = getattr(module, "quant_method", None)
            if type(method).__name__ == EXPERTS_METHOD:
                method.moe_kernel.fused_experts.process_weights_after_loading(module)


class WorkerExtension:
    """Methods that vLLM adds to its worker class, called with `collective_rpc`."""

    weight_transfer_engine: ReceivingEngine

    def transfer_outcome(self) -> dict[str, Any]:
        """Outcome of this worker's last transfer; see `ReceivingEngine.outcome`."""
        return self.weight_transfer_engine.outcome


def exit_with_actor(actor_id: int, *, core_id: int | None) -> None:
    """Exit this process, and vLLM's engine core above it, when the actor process exits.

    The core would otherwise wait for its workers indefinitely. `core_id` None: this process is the
    core.
    """

    def watch() -> None:
        try:
            actor = os.pidfd_open(actor_id)
        except ProcessLookupError:
            pass  # has already exited
        else:
            select.select([actor], [], [])
        if core_id is not None and os.getppid() == core_id:
            os.kill(core_id, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="exit-with-actor", daemon=True).start()


def _completed_outcome(
    report: TransferReport, trace: LoadTrace, untraced: Sequence[str]
) -> dict[str, Any]:
    canary = report.canary
    return {
        "error": None,
        "transfer_s": report.transfer_s,
        "num_bytes": report.num_bytes,
        "untraced": list(untraced),
        "parts": {name: (num, list(parts)) for name, (num, parts) in trace.sources.items()},
        "token_ids": list(canary.token_ids) if canary is not None else [],
        "logprobs": list(canary.logprobs) if canary is not None else [],
    }


WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, ReceivingEngine)
