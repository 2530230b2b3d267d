"""Log-probabilities of given tokens by plain forward passes."""

from typing import Any

import numpy as np
import torch

from speed_async.actors.engine import GenerationRequest
from speed_async.actors.torch_engine.sampling import keep_nucleus
from speed_async.types import Sampled


def mixed_requests(
    count: int, seed: int = 0, *, temperature: float = 1.0, top_p: float = 1.0
) -> list[GenerationRequest]:
    """Prompts of 1..20 tokens, every third one equal to its predecessor; lengths 1..60."""
    random = np.random.default_rng(seed)
    prompts: list[np.ndarray] = []
    for i in range(count):
        fresh = random.integers(3, 40, random.integers(1, 21), np.int32)
        prompts.append(prompts[-1] if i % 3 == 1 else fresh)
    return [
        GenerationRequest(
            prompt_token_ids=prompt,
            max_new_tokens=int(random.integers(1, 61)),
            temperature=temperature,
            top_p=top_p,
            priority=i % 2,
        )
        for i, prompt in enumerate(prompts)
    ]


def forced_logprobs(model: Any, one: GenerationRequest, sampled: Sampled) -> torch.Tensor:
    """log mu (T,) from a plain forward pass over the whole sequence, without cache."""
    tokens = np.concatenate([one.prompt_token_ids, sampled.token_ids]).astype(np.int64)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0]
    return _of_completion(logits, one, sampled)


def logprobs_with_old_cache(old: Any, new: Any, one: GenerationRequest, sampled: Sampled, version):
    """log mu (T,) of a sequence that continues under new weights with the old KV cache."""
    tokens = torch.from_numpy(np.concatenate([one.prompt_token_ids, sampled.token_ids])).long()
    num_old = len(one.prompt_token_ids) + int((sampled.policy_versions != version).sum())
    with torch.no_grad():
        # The newest token's keys are computed by the next step, under the new weights.
        first = old(tokens[None, : num_old - 1], use_cache=True)
        rest = new(tokens[None, num_old - 1 :], past_key_values=first.past_key_values)
    return _of_completion(torch.cat([first.logits[0], rest.logits[0]]), one, sampled)


def _of_completion(logits: torch.Tensor, one: GenerationRequest, sampled: Sampled) -> torch.Tensor:
    """log mu (T,) from the logits at every position of the prompt and the completion."""
    logits = logits[len(one.prompt_token_ids) - 1 : -1]
    logprobs = keep_nucleus(
        torch.log_softmax(logits / one.temperature, -1), torch.full((len(logits),), one.top_p)
    )
    token_ids = torch.from_numpy(sampled.token_ids.astype(np.int64))
    return logprobs.gather(1, token_ids[:, None])[:, 0]
