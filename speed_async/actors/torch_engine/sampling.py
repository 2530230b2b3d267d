"""Samples one token per row and returns its exact sampling log-probability.

Shape legend: N rows, V vocabulary.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor


def sample(
    logits_NV: Tensor,
    *,
    temperature_N: Tensor | None,
    top_p_N: Tensor | None,
    random: torch.Generator,
    seeded: Mapping[int, torch.Generator] = MappingProxyType({}),
    has_greedy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sample a token (N,) int64 and its log mu (N,) float32 for every row.

    log mu = log_softmax(logits / temperature), renormalised over the nucleus where top_p < 1.
    None means all ones and skips the computation. With `has_greedy`, rows of temperature 0 take the
    most likely token, and their log mu is that of temperature 1. Rows in `seeded` use their own
    generator. A row with non-finite logits returns a non-finite log mu; the caller must check for
    it.
    """
    logits_NV = logits_NV.float()
    greedy_N = None
    if has_greedy and temperature_N is not None:
        greedy_N = temperature_N == 0
        temperature_N = temperature_N.masked_fill(greedy_N, 1.0)
    if temperature_N is not None:
        logits_NV = logits_NV / temperature_N[:, None]
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    if top_p_N is not None:
        logprobs_NV = keep_nucleus(logprobs_NV, top_p_N)
    # Exponential race: argmax of p / Exp(1) is distributed as p. It needs no cumulative sum, whose
    # rounding could select a token of probability zero, and no synchronisation with the host.
    race_NV = torch.empty_like(logprobs_NV).exponential_(generator=random)
    for row, generator in seeded.items():
        race_NV[row].exponential_(generator=generator)
    tokens_N = logprobs_NV.exp().div_(race_NV).argmax(dim=-1)
    if greedy_N is not None:  # of the logits: rounding can make log-probabilities equal
        tokens_N = torch.where(greedy_N, logits_NV.argmax(dim=-1), tokens_N)
    return tokens_N, logprobs_NV.gather(1, tokens_N[:, None]).squeeze(1)


def keep_nucleus(logprobs_NV: Tensor, top_p_N: Tensor) -> Tensor:
    """Renormalised log-probabilities (N, V) of the smallest set of mass >= top_p in each row.

    Nucleus sampling, Holtzman et al. 2020 (arXiv 1904.09751), section 3.1. The most likely token
    is always kept; rows with top_p = 1 are unchanged.
    """
    sorted_NV, order_NV = logprobs_NV.sort(dim=-1, descending=True)
    probs_NV = sorted_NV.exp()
    mass_before_NV = probs_NV.cumsum(dim=-1) - probs_NV
    dropped_NV = (mass_before_NV >= top_p_N[:, None]) & (top_p_N[:, None] < 1)
    dropped_NV[:, 0] = False
    sorted_NV = sorted_NV.masked_fill(dropped_NV, -torch.inf)
    sorted_NV = sorted_NV - sorted_NV.logsumexp(dim=-1, keepdim=True)
    kept_NV = torch.empty_like(sorted_NV).scatter_(1, order_NV, sorted_NV)
    # Rows with top_p = 1 stay exact: renormalising would only add rounding.
    return torch.where(top_p_N[:, None] < 1, kept_NV, logprobs_NV)
