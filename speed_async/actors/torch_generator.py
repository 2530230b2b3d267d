"""Continuous batching over any Hugging Face causal LM: the synchronous, pure core.

A step decodes one token for every running row. Sequences join and leave between steps. A prompt
enters the KV cache up to its last token; that token is the row's first decode input, so every
sampled token comes from the same code, and rows with equal prompts share one prefill.

Shape legend: N rows in use, U rows in one prefill, P prefilled positions, L attended positions,
V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speed_async.actors.admission import AdmissionPrice, WaitingLine, sequence_limit
from speed_async.actors.engine import EngineStats, GenerationRequest
from speed_async.actors.sampling import sample
from speed_async.actors.slots import Int64Array, SlotCache, SlotTable
from speed_async.actors.span_attention import SPANS_KEYWORD, attend_by_span
from speed_async.actors.stepper import Finished
from speed_async.errors import SpeedAsyncError, WeightSyncError
from speed_async.types import FinishReason, Float32Array, Sampled, WeightOffer
from speed_async.weights.channel import NamedTensor, WeightReceiver

_PREFILL_TOKENS = 16384
"""Padded tokens in one prefill pass; bounds its activations."""


class TorchGenerator:
    """Implements `Stepper` over a causal LM that it owns (weights are loaded in place).

    `random` lives on the model's device. Log-probabilities equal those of a plain forward pass
    up to rounding of the model's dtype.
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
    ) -> None:
        self.model = model.eval()
        self.context_length = context_length
        self._eos_token_ids = tuple(eos_token_ids)
        self._random = random
        self._receiver = receiver
        self._policy_version = policy_version
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._waiting = WaitingLine()
        self._price = AdmissionPrice()
        self._table = SlotTable(num_slots)
        self._cache = SlotCache(num_slots)
        self._tokens_generated = 0
        self._num_steps = 0
        self._is_whole = True
        self._attends_by_span = attend_by_span(self.model)

    @property
    def has_work(self) -> bool:
        return bool(self._table.num_active or len(self._waiting))

    @property
    def is_whole(self) -> bool:
        return self._is_whole

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
        sequence_limit(request, self.context_length)
        self._waiting.push(key, request)

    def cancel(self, key: int) -> int:
        if self._waiting.remove(key):
            return 0
        rows = np.flatnonzero(self._table.active & (self._table.keys == key))
        return sum(self._table.release(int(row), "abort").num_tokens for row in rows)

    def abort(self) -> list[Finished]:
        finished = self._release(np.flatnonzero(self._table.active), "abort")
        self._table.cut_tail()
        nothing = np.zeros(0, np.int32)
        while len(self._waiting):
            key, _ = self._waiting.pop()
            sampled = Sampled(
                token_ids=nothing,
                logprobs=np.zeros(0, np.float32),
                policy_versions=nothing,
                finish_reason="abort",
            )
            finished.append(Finished(key=key, sampled=sampled))
        return finished

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Admit what is due and sample one token for every running row.

        Raises SpeedAsyncError when the model yields non-finite log-probabilities.
        """
        table = self._table
        num_free = table.num_slots - table.num_active
        num_enterable = min(num_free, len(self._waiting))
        if self._price.is_due(num_running=table.num_active, num_enterable=num_enterable):
            self._admit(num_enterable)
        self._compact()
        if not table.num_active:
            return []
        tokens_N, logprobs_N = self._decode()
        self._check_finite(logprobs_N)
        table.append(tokens_N, logprobs_N, self._policy_version)
        self._tokens_generated += table.num_active
        self._num_steps += 1
        return self._collect(tokens_N)

    # --- joining ------------------------------------------------------------------------------

    def _admit(self, count: int) -> None:
        entering = [self._waiting.pop() for _ in range(count)]
        limits = [sequence_limit(request, self.context_length) for _, request in entering]
        self._table.reserve(max(limits))
        self._cache.reserve(max(limits))
        # A row that already holds this prompt serves as its prefill: its prompt positions were
        # computed under the present weights (updates recompute every running row).
        self._close_gaps()
        holders = self._prompts_held()
        prefilled: list[int] = []
        copies: list[tuple[int, int]] = []
        rows = range(self._table.num_rows, self._table.num_rows + count)
        for row, (key, request), limit in zip(rows, entering, limits, strict=True):
            prompt = request.prompt_token_ids
            self._table.occupy(row, key, prompt, limit, request.temperature, request.top_p)
            holder = holders.setdefault(prompt.tobytes(), row)
            if holder == row:
                prefilled.append(row)
            else:
                copies.append((holder, row))
        self._prefill(np.array(prefilled, np.int64))
        self._copy_prompts(copies)

    def _prompts_held(self) -> dict[bytes, int]:
        table = self._table
        return {
            table.tokens[row, : table.num_prompt[row]].tobytes(): row
            for row in np.flatnonzero(table.active).tolist()
        }

    def _copy_prompts(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            sources, destinations = np.array(copies, np.int64).T
            length = int(self._table.num_prompt[destinations].max()) - 1
            self._cache.copy_rows(self._to_device(sources), self._to_device(destinations), length)

    def _prefill(self, rows: Int64Array) -> None:
        """Compute the KV of all but the newest token of these rows, in bounded passes."""
        for chunk in self._prefill_chunks(rows):
            num_positions = int(self._table.length[chunk].max()) - 1
            tokens_UP = self._table.tokens[chunk, :num_positions].astype(np.int64)
            positions_1P = torch.arange(num_positions, device=self._device)[None]
            mask_11PP = torch.full(
                (1, 1, num_positions, num_positions),
                -torch.inf,
                dtype=self._dtype,
                device=self._device,
            ).triu_(1)
            self._cache.begin_prefill(self._to_device(chunk))
            # The body alone: no logits are wanted here.
            self.model.base_model(
                input_ids=self._to_device(tokens_UP),
                position_ids=positions_1P.expand(len(chunk), -1),
                attention_mask=mask_11PP,
                past_key_values=self._cache,
                use_cache=True,
            )

    def _prefill_chunks(self, rows: Int64Array) -> Iterator[Int64Array]:
        lengths = self._table.length[rows] - 1
        rows, lengths = rows[lengths > 0], lengths[lengths > 0]
        order = np.argsort(lengths, kind="stable")
        rows, lengths = rows[order], lengths[order]
        while len(rows):
            # Ascending lengths: the last row of a chunk sets its width.
            widths = lengths * np.arange(1, len(rows) + 1)
            count = max(1, int(np.searchsorted(widths, _PREFILL_TOKENS, side="right")))
            yield rows[:count]
            rows, lengths = rows[count:], lengths[count:]

    # --- stepping -----------------------------------------------------------------------------

    def _decode(self) -> tuple[Int64Array, Float32Array]:
        table, count = self._table, self._table.num_rows
        feed_2N = self._to_device(table.feed[:, :count])
        positions_N = feed_2N[1]
        spans = table.spans()
        attended = max(span[2] for span in spans)
        self._cache.begin_decode(positions_N, attended)
        mask_NL = torch.where(
            torch.arange(attended, device=self._device) <= positions_N[:, None], 0.0, -torch.inf
        ).to(self._dtype)
        logits_N1V = self.model(
            input_ids=feed_2N[0][:, None],
            position_ids=positions_N[:, None],
            attention_mask=mask_NL[:, None, None],
            past_key_values=self._cache,
            use_cache=True,
            **({SPANS_KEYWORD: spans} if self._attends_by_span else {}),
        ).logits
        temperature, top_p = table.temperature[:count], table.top_p[:count]
        tokens_N, logprobs_N = sample(
            logits_N1V[:, 0],
            temperature_N=None if (temperature == 1).all() else self._to_device(temperature),
            top_p_N=None if (top_p == 1).all() else self._to_device(top_p),
            random=self._random,
        )
        return tokens_N.cpu().numpy(), logprobs_N.cpu().numpy()

    def _check_finite(self, logprobs_N: Float32Array) -> None:
        wrong_N = ~np.isfinite(logprobs_N) & self._table.active[: len(logprobs_N)]
        if wrong_N.any():
            self._is_whole = False
            # Not a ModelError: that one is about a single request, and this ends the engine.
            raise SpeedAsyncError(
                f"the model of policy version {self._policy_version} gave non-finite logits for "
                f"{int(wrong_N.sum())} of {self._table.num_active} sequences: its weights have "
                "diverged or its dtype overflows"
            )

    def _collect(self, tokens_N: Int64Array) -> list[Finished]:
        table, count = self._table, self._table.num_rows
        stopped_N = np.zeros(count, bool)
        for eos_token_id in self._eos_token_ids:
            stopped_N |= tokens_N == eos_token_id
        stopped_N &= table.active[:count]
        full_N = table.active[:count] & (table.length[:count] >= table.limit[:count]) & ~stopped_N
        finished = self._release(np.flatnonzero(stopped_N), "stop")
        return finished + self._release(np.flatnonzero(full_N), "length")

    def _release(self, rows: Int64Array, finish_reason: FinishReason) -> list[Finished]:
        return [
            Finished(
                key=int(self._table.keys[row]), sampled=self._table.release(row, finish_reason)
            )
            for row in rows.tolist()
        ]

    def _compact(self) -> None:
        table = self._table
        table.cut_tail()
        # Moving a row costs about as much as a few steps of computing it for nothing, and the
        # next admission closes all gaps anyhow.
        num_gaps = table.num_rows - table.num_active
        if not len(self._waiting) and 8 * num_gaps > table.num_rows:
            self._close_gaps()

    def _close_gaps(self) -> None:
        for moves in self._table.close_gaps():
            self._cache.copy_rows(
                self._to_device(moves.sources), self._to_device(moves.destinations), moves.longest
            )

    # --- weights ------------------------------------------------------------------------------

    def load_weights(self, offer: WeightOffer) -> float:
        if self._receiver is None:
            raise WeightSyncError("this engine was made without a weight receiver")
        # Tied weights are one parameter here, under its first name.
        parameters = dict(self.model.named_parameters())
        missing = set(parameters)

        def load(bucket: Sequence[NamedTensor]) -> None:
            self._is_whole = False
            for name, tensor in bucket:
                parameters[name].copy_(tensor, non_blocking=True)
                missing.discard(name)
            if self._device.type == "cuda":  # the tensors are only lent for this call
                torch.cuda.current_stream(self._device).synchronize()

        with torch.no_grad():
            expected = [(name, parameter.detach()) for name, parameter in parameters.items()]
            report = self._receiver.receive(offer, expected, load)
            if missing:
                raise WeightSyncError(
                    f"policy version {offer.policy_version} came without {len(missing)} of "
                    f"{len(parameters)} tensors, first {min(missing)}"
                )
        self._is_whole = True
        self._policy_version = offer.policy_version
        with torch.inference_mode():
            self._prefill(np.flatnonzero(self._table.active))
        return report.transfer_s

    def _to_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
