"""Who enters the running batch, and when: request checks, waiting line, admission price.

Shape legend: P prompt tokens.
"""

import heapq
from dataclasses import dataclass

from speed_async.actors.engine import GenerationRequest
from speed_async.errors import ConfigError, ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLimits:
    """What a model can take."""

    context_length: int
    """Prompt plus completion tokens of one sequence."""
    num_token_ids: int
    """Rows of its embedding table: token ids are below this."""


def sequence_limit(request: GenerationRequest, limits: ModelLimits) -> int:
    """Largest length (prompt plus completion tokens) this request may reach.

    Raises ModelError when the model cannot take the prompt, ConfigError for unusable sampling
    values.
    """
    context_length = limits.context_length
    num_prompt = len(request.prompt_token_ids)
    if num_prompt == 0:
        raise ModelError("the prompt has no tokens: give at least one (a BOS token will do)")
    if num_prompt >= context_length:
        raise ModelError(
            f"the prompt has {num_prompt} tokens and the context holds {context_length}: "
            "no room for a completion; shorten the prompt or raise model.context_length"
        )
    largest = int(request.prompt_token_ids.max())
    if largest >= limits.num_token_ids:  # a lookup would end the engine, or the whole device
        raise ModelError(
            f"the prompt has token id {largest} and the model's embedding holds "
            f"{limits.num_token_ids} token ids: its tokenizer knows tokens that the model does "
            "not; take the text out of the prompt, or give the model its own tokenizer"
        )
    if request.max_new_tokens < 1:
        raise ConfigError("actors.max_new_tokens", request.max_new_tokens, "must be at least 1")
    if not request.temperature > 0:
        raise ConfigError("actors.temperature", request.temperature, "must be above 0")
    if not 0 < request.top_p <= 1:
        raise ConfigError("actors.top_p", request.top_p, "must be above 0 and at most 1")
    return min(num_prompt + request.max_new_tokens, context_length)


class WaitingLine:
    """Requests not yet running: lower priority value first, first come first within one."""

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
        """Raises IndexError when nobody waits."""
        while True:
            key = heapq.heappop(self._heap)[2]
            if key in self._requests:
                return key, self._requests.pop(key)

    def too_old(self, policy_version: int) -> list[int]:
        """Keys of those whose group is too old for this version already."""
        return [
            key
            for key, request in self._requests.items()
            if request.is_too_old(None, policy_version)
        ]

    def remove(self, key: int) -> bool:
        """Take a request out wherever it stands; False when it does not wait here."""
        return self._requests.pop(key, None) is not None


class AdmissionCost:
    """Decides when free slots are filled, by the ski-rental rule.

    Admitting costs one prefill pass, about as much as one decode step whatever its size, so it
    pays to admit several requests at once; keeping slots free costs their share of every step.
    Admission is due when the second cost has grown to the first: never worse than twice the best
    choice made with hindsight.
    """

    def __init__(self) -> None:
        self._steps_lost = 0.0

    def is_due(self, *, num_running: int, num_enterable: int) -> bool:
        """Asked once a step; `num_enterable` requests wait and have a free slot."""
        if num_enterable == 0:
            self._steps_lost = 0.0
            return False
        self._steps_lost += num_enterable / (num_enterable + num_running)
        if self._steps_lost < 1.0:
            return False
        self._steps_lost = 0.0
        return True
