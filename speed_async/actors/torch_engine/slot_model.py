"""A causal LM over slots: prefill, decode and weight loading, with its KV cache.

Shape legend: N rows in use, U rows in one prefill, P prefilled positions, L attended positions,
V vocabulary, T canary tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speed_async.actors.torch_engine import llama_decoder
from speed_async.actors.torch_engine.cache_size import cache_layout
from speed_async.actors.torch_engine.slot_cache import SlotCache
from speed_async.actors.torch_engine.slots import Int64Array
from speed_async.actors.torch_engine.span_attention import SPANS_KEYWORD, attend_by_span
from speed_async.errors import WeightSyncError
from speed_async.types import Int32Array, WeightOffer
from speed_async.weight_sync.canary_check import Canary, canary_tolerance, verify
from speed_async.weight_sync.channel import NamedTensor, WeightReceiver
from speed_async.weight_sync.digests import tensor_digests, verify_digests

PREFILL_TOKENS = {"cpu": 512, "cuda": 16384}
"""Maximum padded tokens per prefill pass. Bounds activation memory on a GPU; on a CPU, keeps the
activations in its cache."""


class SlotModel:
    """Owns a model (its weights are loaded in place) and the cache of `num_slots` rows."""

    def __init__(
        self, model: Any, num_slots: int, *, canary_tolerance_nats: float | None = None
    ) -> None:
        """`canary_tolerance_nats`: see `weights.canary_tolerance`."""
        self._model = model.eval()
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._canary_tolerance = canary_tolerance(canary_tolerance_nats, self._dtype)
        self._attends_by_span = attend_by_span(model)
        # On a GPU, one block needs one kernel launch, which outweighs shorter reads.
        in_blocks = self._attends_by_span and self._device.type == "cpu"
        self._cache = SlotCache(cache_layout(num_slots, in_blocks=in_blocks))
        self._decoder = None
        if self._attends_by_span and llama_decoder.supports(model):
            self._decoder = llama_decoder.LlamaDecoder(model)
        self.has_valid_weights = True
        """False after an update was interrupted, or failed its digest or canary: the weights then
        match no version."""

    def to_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def reserve(self, length: int) -> None:
        """Reserve space for sequences of `length` positions."""
        self._cache.reserve(length)
        if self._decoder is not None:
            self._decoder.reserve(length)

    def fit(self, length: Int64Array) -> None:
        """Prepare the cache for rows of these lengths (N,)."""
        self._cache.fit(length)

    def append(self, length: Int64Array) -> None:
        """Add rows for sequences of these lengths (U,) after the last row."""
        self._cache.append(length)

    def keep(self, kept_N: NDArray[np.bool_], length: Int64Array) -> Int64Array:
        """Remove the other rows; `length` (N,) before. Row i then is row result[i] before."""
        return self._cache.keep(kept_N, length)

    def copy_prefixes(
        self, sources: Int64Array, destinations: Int64Array, lengths: Int64Array
    ) -> None:
        """Copy the first `lengths[i]` cached positions from sources to destinations (all (U,))."""
        self._cache.copy_prefixes(sources, destinations, lengths)

    def prefill(self, rows: Int64Array, tokens: Int32Array, lengths: Int64Array) -> None:
        """Cache the first `lengths[i]` (U,) of `tokens[rows[i]]` (S, C) for each of `rows` (U,)."""
        for part in prefill_parts(lengths, PREFILL_TOKENS[self._device.type]):
            num_positions = int(lengths[part].max())
            tokens_UP = self.to_device(tokens[rows[part], :num_positions].astype(np.int64))
            # Rows shorter than P are padded at the end; causal attention hides the padding.
            self._cache.begin_prefill(rows[part], lengths[part])
            if self._decoder is not None:
                self._decoder.prefill(tokens_UP, cache=self._cache)
                continue
            positions_1P = torch.arange(num_positions, device=self._device)[None]
            mask_11PP = torch.full(
                (1, 1, num_positions, num_positions),
                -torch.inf,
                dtype=self._dtype,
                device=self._device,
            ).triu_(1)
            self._model.base_model(  # without the LM head: no logits are needed
                input_ids=tokens_UP,
                position_ids=positions_1P.expand(len(part), -1),
                attention_mask=mask_11PP,
                past_key_values=self._cache,
                use_cache=True,
            )

    def decode(self, feed: Int64Array) -> Tensor:
        """Logits (N, V) after each row's newest token; `feed` (2, N): tokens and positions."""
        feed_2N = self.to_device(feed)
        tokens_N, positions_N = feed_2N
        spans = self._cache.begin_decode(feed[1])
        attended = max(span.capacity for span in spans)
        mask_NL = torch.where(
            torch.arange(attended, device=self._device) <= positions_N[:, None], 0.0, -torch.inf
        ).to(self._dtype)
        if self._decoder is not None:
            return self._decoder.decode(
                tokens_N, positions_N, mask_NL=mask_NL, spans=spans, cache=self._cache
            )
        logits_N1V = self._model(
            input_ids=tokens_N[:, None],
            position_ids=positions_N[:, None],
            attention_mask=mask_NL[:, None, None],
            past_key_values=self._cache,
            use_cache=True,
            **({SPANS_KEYWORD: spans} if self._attends_by_span else {}),
        ).logits
        return logits_N1V[:, 0]

    @torch.no_grad()
    def load(self, offer: WeightOffer, receiver: WeightReceiver) -> float:
        """Receive every parameter (tied ones once, under their first name). Verify the digests of
        all parameters, which must hold what the learner sent, and then the canary.

        Returns the seconds of the transfer. Raises WeightSyncError or DeadlineExceeded; see
        `has_valid_weights`.
        """
        parameters = dict(self._model.named_parameters())
        missing = set(parameters)

        def copy_bucket(bucket: Sequence[NamedTensor]) -> None:
            self.has_valid_weights = False
            for name, tensor in bucket:
                parameters[name].copy_(tensor, non_blocking=True)
                missing.discard(name)
            if self._device.type == "cuda":  # the tensors are only valid during this call
                torch.cuda.current_stream(self._device).synchronize()

        expected = [(name, parameter.detach()) for name, parameter in parameters.items()]
        report = receiver.receive(offer, expected, copy_bucket)
        if missing:
            raise WeightSyncError(
                f"policy version {offer.policy_version} lacks {len(missing)} of "
                f"{len(parameters)} tensors, first {min(missing)}"
            )
        version = offer.policy_version
        verify_digests(report.digests, tensor_digests(expected), policy_version=version)
        if report.canary is not None:
            verify(
                report.canary,
                self._logprobs(report.canary),
                tolerance=self._canary_tolerance,
                policy_version=version,
            )
        self.has_valid_weights = True
        return report.transfer_s

    def _logprobs(self, canary: Canary) -> list[float]:
        """Log-probabilities (T-1,) of tokens 1..T-1, from a forward pass without the cache.

        Raises WeightSyncError for token ids outside the model's vocabulary.
        """
        num_token_ids = self._model.get_input_embeddings().weight.shape[0]
        if (largest := max(canary.token_ids)) >= num_token_ids:
            raise WeightSyncError(
                f"the canary has token id {largest} and this model {num_token_ids} ids: all roles "
                "must use the same model folder"
            )
        tokens_T = torch.tensor(canary.token_ids, device=self._device)
        logits_TV = self._model(input_ids=tokens_T[None], use_cache=False).logits[0].float()
        logprobs_TV = logits_TV[:-1].log_softmax(-1)
        return logprobs_TV.gather(1, tokens_T[1:, None])[:, 0].tolist()


def prefill_parts(lengths: Int64Array, max_tokens: int) -> Iterator[Int64Array]:
    """Split rows with lengths (U,) > 0 into passes of at most `max_tokens` padded tokens.

    Rows of similar length share a pass. Yields indices into `lengths`.
    """
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    while len(order):
        # Lengths ascend, so the last row of a pass determines its width.
        num_padded = lengths[order] * np.arange(1, len(order) + 1)
        count = max(1, int(np.searchsorted(num_padded, max_tokens, side="right")))
        yield order[:count]
        order = order[count:]
