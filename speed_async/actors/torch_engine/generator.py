"""Synchronous continuous batching over any Hugging Face causal LM.

A step decodes one token for every running row. Sequences join and leave between steps. Prefill
caches a prompt without its last token, which is the row's first decode input. Every token is thus
sampled by the decode path, and rows with equal prompts share one prefill.

Shape legend: N rows in use, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from speed_async.actors.engine import EngineStats, GenerationRequest
from speed_async.actors.stepped_engine.admission import (
    AdmissionCost,
    ModelLimits,
    WaitingQueue,
    sequence_limit,
)
from speed_async.actors.stepped_engine.stepper import FinishedRequest, empty_sample
from speed_async.actors.torch_engine.sampling import sample
from speed_async.actors.torch_engine.slot_model import SlotModel
from speed_async.actors.torch_engine.slots import Int64Array, SlotTable
from speed_async.errors import SpeedAsyncError, WeightSyncError
from speed_async.types import FinishReason, Float32Array, WeightOffer
from speed_async.weight_sync.channel import WeightReceiver


class TorchGenerator:
    """Implements `Stepper` for a causal LM that it owns (weights are loaded in place).

    `random` is on the model's device. Log-probabilities equal those of a plain forward pass up to
    rounding of the model's dtype.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_slots: int,
        context_length: int,
        eos_token_ids: Sequence[int],
        random: torch.Generator,
        receiver: WeightReceiver | None = None,
        policy_version: int = 0,
        recompute_at_update: bool = True,
        canary_tolerance: float | None = None,
    ) -> None:
        self.limits = ModelLimits(
            context_length=context_length,
            num_token_ids=model.get_input_embeddings().weight.shape[0],
        )
        self._model = SlotModel(model, num_slots, canary_tolerance_nats=canary_tolerance)
        self._eos_token_ids = tuple(eos_token_ids)
        self._random = random
        self._receiver = receiver
        self._policy_version = policy_version
        self._recompute_at_update = recompute_at_update
        self._waiting = WaitingQueue()
        self._requests: dict[int, GenerationRequest] = {}  # requests of the rows in use
        self._seeded: dict[int, torch.Generator] = {}  # random states of requests with a seed
        self._admission = AdmissionCost()
        self._table = SlotTable(num_slots)
        self._tokens_generated = 0
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._table.num_active or len(self._waiting))

    @property
    def has_valid_weights(self) -> bool:
        return self._model.has_valid_weights

    def stats(self) -> EngineStats:
        return EngineStats(
            tokens_generated=self._tokens_generated,
            tokens_running=self._table.tokens_running,
            num_running=self._table.num_active,
            num_waiting=len(self._waiting),
            num_slots=self._table.num_slots,
            policy_version=self._policy_version,
            steps=self._num_steps,
        )

    def submit(self, key: int, request: GenerationRequest) -> None:
        """Raises ModelError or ConfigError when the request cannot be served."""
        sequence_limit(request, self.limits)
        self._waiting.push(key, request)

    def cancel(self, key: int) -> int:
        if self._waiting.remove(key):
            return 0
        rows = np.flatnonzero(self._table.active & (self._table.keys == key))
        return sum(each.sampled.num_tokens for each in self._release(rows, "abort"))

    def abort(self) -> list[FinishedRequest]:
        finished = self._release(np.flatnonzero(self._table.active), "abort")
        while len(self._waiting):
            finished.append(FinishedRequest(key=self._waiting.pop()[0], sampled=empty_sample()))
        return finished

    def abort_stale(self, policy_version: int) -> list[FinishedRequest]:
        table = self._table
        rows = np.flatnonzero(table.active)
        has_tokens = table.length[rows] > table.num_prompt[rows]
        first_versions = table.versions[rows, table.num_prompt[rows] * has_tokens]
        stale = [
            row
            for row, first, has_any in zip(rows, first_versions.tolist(), has_tokens, strict=True)
            if self._requests[int(table.keys[row])].is_stale(
                first if has_any else None, policy_version
            )
        ]
        finished = self._release(np.array(stale, np.int64), "abort")
        for key in self._waiting.stale_keys(policy_version):
            self._waiting.remove(key)
            finished.append(FinishedRequest(key=key, sampled=empty_sample()))
        return finished

    @torch.inference_mode()
    def step(self) -> list[FinishedRequest]:
        """Admit waiting requests when due and sample one token for every running row.

        Raises SpeedAsyncError when the model returns non-finite log-probabilities.
        """
        table = self._table
        num_free = table.num_slots - table.num_active
        num_admissible = min(num_free, len(self._waiting))
        if self._admission.is_due(num_running=table.num_active, num_admissible=num_admissible):
            self._admit(num_admissible)
        if not len(self._waiting) and table.is_sparse:  # otherwise the next admission does it
            self._close_gaps()
        if not table.num_active:
            return []
        tokens_N, logprobs_N = self._decode()
        self._check_finite(logprobs_N)
        table.append(tokens_N, logprobs_N, self._policy_version)
        self._tokens_generated += table.num_active
        self._num_steps += 1
        return self._collect(tokens_N)

    @torch.inference_mode()
    def load_weights(self, offer: WeightOffer) -> float:
        if self._receiver is None:
            raise WeightSyncError("this engine has no weight receiver")
        transfer_s = self._model.load(offer, self._receiver)
        self._policy_version = offer.policy_version
        if self._recompute_at_update:
            self._prefill(np.flatnonzero(self._table.active))
        return transfer_s

    # --- admission ----------------------------------------------------------------------------

    def _admit(self, count: int) -> None:
        entering = [self._waiting.pop() for _ in range(count)]
        limits = [sequence_limit(request, self.limits) for _, request in entering]
        self._table.reserve(max(limits))
        self._model.reserve(max(limits))
        self._close_gaps()
        # Copy the prefill from a row with the same prompt under the current weights.
        prompt_rows = self._cached_prompts()
        prefilled: list[int] = []
        copies: list[tuple[int, int]] = []
        rows = range(self._table.num_rows, self._table.num_rows + count)
        for row, (key, request), limit in zip(rows, entering, limits, strict=True):
            prompt = request.prompt_token_ids
            self._requests[key] = request
            if request.seed is not None:
                generator = torch.Generator(self._random.device)
                self._seeded[key] = generator.manual_seed(request.seed)
            self._table.occupy(row, key, prompt, limit, request.temperature, request.top_p)
            source = prompt_rows.setdefault(prompt.tobytes(), row)
            if source == row:
                prefilled.append(row)
            else:
                copies.append((source, row))
        self._model.append(self._table.length[rows.start : rows.stop])
        self._prefill(np.array(prefilled, np.int64))
        if copies:
            sources, destinations = np.array(copies, np.int64).T
            lengths = self._table.num_prompt[destinations] - 1
            self._model.copy_prefixes(sources, destinations, lengths)

    def _cached_prompts(self) -> dict[bytes, int]:
        table = self._table
        rows = np.flatnonzero(table.active)
        if not self._recompute_at_update:  # a prompt has the version of the row's first token
            first_versions = table.versions[rows, table.num_prompt[rows]]
            rows = rows[first_versions == self._policy_version]
        return {table.tokens[row, : table.num_prompt[row]].tobytes(): row for row in rows.tolist()}

    def _prefill(self, rows: Int64Array) -> None:
        """Fill the KV cache of these rows, except for their newest token."""
        self._model.prefill(rows, self._table.tokens, self._table.length[rows] - 1)

    def _close_gaps(self) -> None:
        table = self._table
        if table.num_rows > table.num_active:
            kept_N = table.active[: table.num_rows]
            table.rearrange(self._model.keep(kept_N, table.length[: table.num_rows]))

    # --- stepping -----------------------------------------------------------------------------

    def _decode(self) -> tuple[Int64Array, Float32Array]:
        table, count = self._table, self._table.num_rows
        self._model.fit(table.length[:count])
        logits_NV = self._model.decode(table.feed[:, :count])
        temperature, top_p = table.temperature[:count], table.top_p[:count]
        tokens_N, logprobs_N = sample(
            logits_NV,
            temperature_N=None if (temperature == 1).all() else self._model.to_device(temperature),
            top_p_N=None if (top_p == 1).all() else self._model.to_device(top_p),
            random=self._random,
            seeded=self._seeded_rows(),
            has_greedy=bool((temperature == 0).any()),
        )
        return tokens_N.cpu().numpy(), logprobs_N.cpu().numpy()

    def _seeded_rows(self) -> dict[int, torch.Generator]:
        if not self._seeded:
            return {}
        rows = np.flatnonzero(self._table.active[: self._table.num_rows]).tolist()
        keys = {int(self._table.keys[row]): row for row in rows}
        return {keys[key]: generator for key, generator in self._seeded.items()}

    def _check_finite(self, logprobs_N: Float32Array) -> None:
        invalid_N = ~np.isfinite(logprobs_N) & self._table.active[: len(logprobs_N)]
        if invalid_N.any():
            # Not a ModelError, which concerns a single request: this failure ends the engine.
            raise SpeedAsyncError(
                f"the model of policy version {self._policy_version} returned non-finite logits "
                f"for {int(invalid_N.sum())} of {self._table.num_active} sequences: its weights "
                "have diverged or its dtype overflows"
            )

    def _collect(self, tokens_N: Int64Array) -> list[FinishedRequest]:
        table, count = self._table, self._table.num_rows
        stopped_N = np.zeros(count, bool)
        for eos_token_id in self._eos_token_ids:
            stopped_N |= tokens_N == eos_token_id
        stopped_N &= table.active[:count]
        full_N = table.active[:count] & (table.length[:count] >= table.limit[:count]) & ~stopped_N
        finished = self._release(np.flatnonzero(stopped_N), "stop")
        return finished + self._release(np.flatnonzero(full_N), "length")

    def _release(self, rows: Int64Array, finish_reason: FinishReason) -> list[FinishedRequest]:
        finished = [
            FinishedRequest(
                key=int(self._table.keys[row]), sampled=self._table.release(row, finish_reason)
            )
            for row in rows.tolist()
        ]
        for each in finished:
            del self._requests[each.key]
            self._seeded.pop(each.key, None)
        return finished
