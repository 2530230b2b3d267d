import math

import pytest
import torch
from torch import Tensor

from speed_async.learner.diagnostics import Diagnostics
from speed_async.learner.losses import LossTokens, truncated_importance_sampling


def loss_tokens(pi: list[float], mu: list[float], advantages: list[float]) -> LossTokens:
    return LossTokens(
        logprobs_N=torch.tensor(pi, dtype=torch.float64).log().requires_grad_(),
        behaviour_logprobs_N=torch.tensor(mu, dtype=torch.float64).log(),
        advantages_N=torch.tensor(advantages, dtype=torch.float64),
        sequence_ids_N=torch.arange(len(pi)),
        num_sequences=len(pi),
    )


def test_loss_is_minus_the_truncated_ratio_times_advantage_times_log_pi():
    tokens = loss_tokens(pi=[0.5, 0.25, 0.1], mu=[0.25, 0.5, 0.1], advantages=[2.0, -1.0, 3.0])

    terms = truncated_importance_sampling(tokens, max_ratio=1.5)

    # ratios 2, 0.5, 1; cut to 1.5, 0.5, 1
    expected = -(1.5 * 2 * math.log(0.5) + 0.5 * -1 * math.log(0.25) + 1 * 3 * math.log(0.1))
    assert terms.loss_sum.item() == pytest.approx(expected, rel=1e-12)
    assert terms.truncated_N.tolist() == [True, False, False]


def test_the_gradient_does_not_flow_through_the_ratio():
    tokens = loss_tokens(pi=[0.5, 0.25], mu=[0.25, 0.5], advantages=[2.0, -1.0])

    truncated_importance_sampling(tokens, max_ratio=1.5).loss_sum.backward()

    assert tokens.logprobs_N.grad is not None
    assert tokens.logprobs_N.grad.tolist() == pytest.approx([-1.5 * 2, 0.5 * 1])


def test_a_ratio_beyond_float_range_counts_as_the_cap():
    tokens = LossTokens(
        logprobs_N=torch.tensor([-1.0], requires_grad=True),
        behaviour_logprobs_N=torch.tensor([-500.0]),
        advantages_N=torch.tensor([1.0]),
        sequence_ids_N=torch.tensor([0]),
        num_sequences=1,
    )
    terms = truncated_importance_sampling(tokens, max_ratio=2.0)
    diagnostics = Diagnostics()
    diagnostics.add(tokens, terms, torch.zeros(1))

    assert terms.loss_sum.item() == pytest.approx(2.0)
    assert all(math.isfinite(value) for value in diagnostics.metrics(1).values())


def entropies(*values: float) -> Tensor:
    return torch.tensor(values)


def test_diagnostics_of_two_tokens_with_ratios_two_and_a_half():
    tokens = loss_tokens(pi=[0.5, 0.25], mu=[0.25, 0.5], advantages=[1.0, 1.0])
    terms = truncated_importance_sampling(tokens, max_ratio=1.5)
    diagnostics = Diagnostics()
    diagnostics.add(tokens, terms, entropies(0.2, 0.6))

    metrics = diagnostics.metrics(num_tokens=4)

    assert metrics == pytest.approx(
        {
            "loss": -(1.5 * math.log(0.5) + 0.5 * math.log(0.25)) / 4,
            "ratio_mean": 1.25,
            "ratio_max": 2.0,
            "truncated_share": 0.5,
            "kl_k1": 0.0,  # -(log 2 + log 1/2) / 2
            "kl_k3": 0.25,  # ((2 - 1 - log 2) + (1/2 - 1 + log 2)) / 2
            "effective_sample_size": 2.5**2 / (2 * (4 + 0.25)),
            "entropy": 0.4,
        },
        abs=1e-7,
    )


def test_diagnostics_do_not_depend_on_the_cut_into_micro_batches():
    pi, mu, advantages = [0.5, 0.25, 0.1], [0.25, 0.5, 0.4], [1.0, -2.0, 0.5]
    whole, parts = Diagnostics(), Diagnostics()
    for diagnostics, cuts in ((whole, [slice(0, 3)]), (parts, [slice(0, 1), slice(1, 3)])):
        for cut in cuts:
            tokens = loss_tokens(pi[cut], mu[cut], advantages[cut])
            terms = truncated_importance_sampling(tokens, max_ratio=1.5)
            diagnostics.add(tokens, terms, entropies(0.1, 0.2, 0.3)[cut])

    assert parts.metrics(3) == pytest.approx(whole.metrics(3), rel=1e-12)


def test_without_tokens_there_is_only_a_loss_of_zero():
    assert Diagnostics().metrics(num_tokens=5) == {"loss": 0.0}
