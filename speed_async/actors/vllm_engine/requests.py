# pyright: reportMissingImports=false
"""Conversion of requests and outputs between this package and vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from speed_async.actors.engine import GenerationRequest
from speed_async.errors import SpeedAsyncError
from speed_async.types import FinishReason, Sampled
from speed_async.weight_sync.canary_check import Canary


@dataclass(slots=True)
class LiveRequest:
    """A request that has not returned."""

    request: GenerationRequest | None  # None: the canary
    queue: Any  # vllm's RequestOutputCollector
    state: Any  # vllm's RequestState; None when the request had already finished

    first_version: int | None = None
    """Policy version of the first token, set at the first update after it."""

    @property
    def num_tokens(self) -> int:
        return 0 if self.state is None else self.state.detokenizer.num_output_tokens()

    @property
    def is_running(self) -> bool:
        return self.state is not None and not self.state.is_prefilling


def sampling_params(
    request: GenerationRequest, limit: int, eos_token_ids: Sequence[int]
) -> SamplingParams:
    """`limit`: maximum prompt plus completion tokens."""
    return SamplingParams(
        max_tokens=limit - len(request.prompt_token_ids),
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        logprobs=0,
        flat_logprobs=True,
        stop_token_ids=list(eos_token_ids),
        ignore_eos=True,  # except for the ids above
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def canary_params() -> SamplingParams:
    """Parameters for prompt log-probabilities; samples the one token that vLLM requires."""
    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def canary_logprobs(canary: Canary, output: Any) -> list[float]:
    """Log-probabilities (T-1,) of the canary's tokens 1..T-1, from vLLM's `RequestOutput`."""
    pairs = zip(canary.token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [float(position[token_id].logprob) for token_id, position in pairs]


def sampled(output: Any) -> Sampled:
    """Converts vLLM's `CompletionOutput` with flat log-probabilities."""
    token_ids = np.asarray(output.token_ids, np.int32)
    spans = output.weight_versions or ()
    return Sampled(
        token_ids=token_ids,
        logprobs=np.asarray(output.logprobs.logprobs if len(token_ids) else (), np.float32),
        policy_versions=np.repeat(
            np.array([int(span.version) for span in spans], np.int32),
            [span.end - span.start for span in spans],
        ),
        finish_reason=_finish_reason(output.finish_reason),
    )


def _finish_reason(reason: str | None) -> FinishReason:
    match reason:
        case "stop" | "length" | "abort":
            return reason
        case _:
            raise SpeedAsyncError(
                f"vLLM finished a request with reason '{reason}'; see the actor's log"
            )
