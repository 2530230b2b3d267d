"""Admission to the running batch: request validation, waiting queue, admission policy.

Shape legend: P prompt tokens.
"""

import heapq
from dataclasses import dataclass

from speed_async.actors.engine import GenerationRequest
from speed_async.errors import ConfigError, ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLimits:
    """Limits on the requests that a model can serve."""

    context_length: int
    """Maximum prompt plus completion tokens of one sequence."""
    num_token_ids: int
    """Rows of the embedding table; valid token ids are below this."""


def sequence_limit(request: GenerationRequest, limits: ModelLimits) -> int:
    """Maximum length (prompt plus completion tokens) of this request.

    Raises ModelError when the model cannot serve the prompt, ConfigError for invalid sampling
    values.
    """
    context_length = limits.context_length
    num_prompt = len(request.prompt_token_ids)
    if num_prompt == 0:
        raise ModelError("the prompt has no tokens: provide at least one (for example a BOS token)")
    if num_prompt >= context_length:
        raise ModelError(
            f"the prompt has {num_prompt} tokens and the context holds {context_length}: "
            "no space for a completion; shorten the prompt or raise model.context_length"
        )
    largest = int(request.prompt_token_ids.max())
    if largest >= limits.num_token_ids:  # an out-of-range lookup crashes the engine or the device
        raise ModelError(
            f"the prompt has token id {largest} and the model's embedding holds "
            f"{limits.num_token_ids} token ids: the tokenizer has tokens that the model lacks; "
            "remove the text from the prompt, or use the model's own tokenizer"
        )
    if request.max_new_tokens < 1:
        raise ConfigError("actors.max_new_tokens", request.max_new_tokens, "must be at least 1")
    if not request.temperature >= 0:
        raise ConfigError("actors.temperature", request.temperature, "must be at least 0")
    if not 0 < request.top_p <= 1:
        raise ConfigError("evaluate.suites.top_p", request.top_p, "must be above 0 and at most 1")
    return min(num_prompt + request.max_new_tokens, context_length)


class WaitingQueue:
    """Requests not yet running, ordered by priority value, FIFO within a priority."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int]] = []  # (priority, arrival, key)
        self._requests: dict[int, GenerationRequest] = {}
        self._num_arrivals = 0

    def __len__(self) -> int:
        return len(self._requests)

    def push(self, key: int, request: GenerationRequest) -> None:
        heapq.heappush(self._heap, (request.priority, self._num_arrivals, key))
        self._requests[key] = request
        self._num_arrivals += 1

    def pop(self) -> tuple[int, GenerationRequest]:
        """Raises IndexError when the queue is empty."""
        while True:
            key = heapq.heappop(self._heap)[2]
            if key in self._requests:
                return key, self._requests.pop(key)

    def stale_keys(self, policy_version: int) -> list[int]:
        """Keys of the requests whose group is too stale for this version."""
        return [
            key for key, request in self._requests.items() if request.is_stale(None, policy_version)
        ]

    def remove(self, key: int) -> bool:
        """Remove a request; False when it is not in the queue."""
        return self._requests.pop(key, None) is not None


class AdmissionCost:
    """Decides when to fill free slots, by the ski-rental rule.

    Admission costs one prefill pass, about as much as one decode step regardless of its size, so
    batching admissions is cheaper; a free slot costs its share of every step. Admission is due
    when the accumulated cost of free slots reaches the cost of a prefill pass. The total cost is
    at most twice that of the optimal offline policy.
    """

    def __init__(self) -> None:
        self._steps_lost = 0.0

    def is_due(self, *, num_running: int, num_admissible: int) -> bool:
        """Called once per step; `num_admissible` waiting requests have a free slot."""
        if num_admissible == 0:
            self._steps_lost = 0.0
            return False
        self._steps_lost += num_admissible / (num_admissible + num_running)
        if self._steps_lost < 1.0:
            return False
        self._steps_lost = 0.0
        return True
