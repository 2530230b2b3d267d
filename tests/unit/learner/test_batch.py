import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from speed_async.config.sections.learner import LearnerConfig
from speed_async.learner import policy as policy_file
from speed_async.learner import rows as rows_file
from speed_async.learner.batch import MicroBatch, make_micro_batch
from speed_async.learner.micro_batches import MicroBatches
from speed_async.learner.model import load_model, output_head
from speed_async.learner.policy import Policy, check_policy, layout_cost
from speed_async.learner.rows import (
    LayoutCost,
    TrainingRow,
    choose_width,
    lay_out,
    split_row,
    split_rows,
    training_row,
)
from speed_async.types import Group
from tests.fakes.learner_samples import (
    VOCABULARY,
    make_completion,
    make_group,
    random_groups,
    save_tiny_llama,
)

LONG = make_completion([5, 6, 7], 1.0, [-0.1, -0.2, -0.3])
SHORT = make_completion([8, 9], 0.0, [-0.4, -0.5])
TOLERANCE = 1e-6


def full_row(group: Group, advantages: list[float] | None = None) -> TrainingRow:
    """A row of all completions. By default, the advantage is the index from 1, which identifies the
    completion in every layout. The weight is a tenth of the index."""
    numbers_N = np.arange(1, len(group.completions) + 1, dtype=np.float64)
    return training_row(
        group,
        advantages_N=numbers_N if advantages is None else np.array(advantages, np.float64),
        weights_N=numbers_N / 10,
        kept_N=np.ones(len(group.completions), dtype=np.bool_),
    )


def batch_of(groups: list[Group], width: int, policy_version: int = 0) -> MicroBatch:
    rows = [row for group in groups for row in split_row(full_row(group), width)]
    return make_micro_batch(rows, policy_version=policy_version)


def per_token(batch: MicroBatch) -> list[tuple[int, int]]:
    """Predicting position and target of every token."""
    pairs_N2 = torch.stack([batch.predictor_index_D, batch.target_ids_D], dim=1)[batch.pair_index_N]
    return [(predictor, target) for predictor, target in pairs_N2.tolist()]


def visible(batch: MicroBatch, row: int) -> list[list[int]]:
    assert batch.mask_B1LL is not None
    return (batch.mask_B1LL[row, 0] == 0).int().tolist()


def test_rows_of_one_completion_are_right_padded():
    batch = batch_of([make_group([1, 2], SHORT, LONG)], width=1)

    assert batch.input_ids_BL.tolist() == [[1, 2, 5, 6], [1, 2, 8, 0]]
    assert batch.position_ids_BL is None
    assert batch.mask_B1LL is None
    assert per_token(batch) == [(1, 5), (2, 6), (3, 7), (4 + 1, 8), (4 + 2, 9)]
    assert batch.advantages_N.tolist() == [2.0, 2.0, 2.0, 1.0, 1.0]
    assert batch.weights_N.tolist() == pytest.approx([0.2, 0.2, 0.2, 0.1, 0.1])
    assert batch.ages_N.tolist() == [0] * 5
    np.testing.assert_allclose(batch.behaviour_logprobs_N, [-0.1, -0.2, -0.3, -0.4, -0.5])
    assert batch.sequence_ids_N.tolist() == [0, 0, 0, 1, 1]
    assert batch.num_sequences == 2


def test_completions_share_a_prompt_without_attending_to_each_other():
    batch = batch_of([make_group([1, 2], LONG, SHORT)], width=2)

    assert batch.input_ids_BL.tolist() == [[1, 2, 5, 6, 8]]
    assert batch.position_ids_BL is not None
    assert batch.position_ids_BL.tolist() == [[0, 1, 2, 3, 2]]
    assert per_token(batch) == [(1, 5), (2, 6), (3, 7), (1, 8), (4, 9)]
    assert visible(batch, 0) == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_completions_that_begin_alike_share_positions():
    completions = [[5, 6, 7], [5, 8], [5, 6, 7], [5, 6, 9, 3]]
    group = make_group([1, 2], *[make_completion(ids, 0.0) for ids in completions])
    other = make_group([4], make_completion([7], 0.0), make_completion([8], 0.0))

    batch = batch_of([group, other], width=4)

    assert batch.input_ids_BL.tolist() == [[1, 2, 5, 6, 9], [4, 0, 0, 0, 0]]
    assert batch.position_ids_BL is not None
    assert batch.position_ids_BL[0].tolist() == [0, 1, 2, 3, 4]
    assert batch.sequence_ids_N.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 5]
    assert per_token(batch) == [
        *[(1, 5), (2, 6), (3, 7)] * 2,
        *[(1, 5), (2, 6), (3, 9), (4, 3)],
        *[(1, 5), (2, 8)],
        *[(5, 7), (5, 8)],
    ]
    assert len(batch.target_ids_D) == 8  # the other 6 are computed once
    assert visible(batch, 0) == torch.ones(5, 5).tril().int().tolist()


def test_positions_attend_to_the_tokens_before_them_in_their_own_completion():
    completions = [[5, 6, 7, 3], [5, 6, 8, 3], [5, 9, 3]]
    batch = batch_of([make_group([1], *[make_completion(ids, 0.0) for ids in completions])], 3)

    assert batch.input_ids_BL.tolist() == [[1, 5, 6, 7, 8, 9]]
    assert visible(batch, 0) == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_token_ages_are_never_negative():
    mixed = make_completion([5, 6, 7], 1.0)
    mixed.sampled.policy_versions[:] = [3, 5, 9]
    assert batch_of([make_group([1], mixed)], 1, policy_version=7).ages_N.tolist() == [4, 2, 0]


def test_training_row_selects_completions_with_a_gradient():
    group = make_group([1], LONG, SHORT, LONG, make_completion([], 0.0))
    row = training_row(
        group,
        advantages_N=np.array([0.5, -0.5, 0.0, 1.0]),
        weights_N=np.array([0.1, 0.2, 0.3, 0.4]),
        kept_N=np.array([True, False, True, True]),
    )
    assert [(s.token_ids.tolist(), s.advantage, s.weight) for s in row.samples] == [
        ([5, 6, 7], 0.5, 0.1)
    ]


def test_a_group_without_signal_gives_no_row_and_an_empty_prompt_raises():
    assert list(split_row(full_row(make_group([1], LONG), [0.0]), 1)) == []
    assert list(split_row(full_row(make_group([1], make_completion([], 0.0))), 2)) == []
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        full_row(make_group([], LONG))


def test_micro_batches_have_at_most_max_tokens_padded_positions():
    lengths = [6, 1, 3, 3, 9, 2]  # input tokens of a row: prompt 2 + length - 1
    groups = [make_group([1, 2], make_completion([3] * n, 0.0)) for n in lengths]
    rows = [full_row(group) for group in groups]

    parts = split_rows(rows, max_tokens=9)

    assert [[row.num_tokens for row in part] for part in parts] == [[10], [7], [4, 4], [3, 2]]


@pytest.mark.parametrize(
    ("median", "shortest", "longest", "count", "max_tokens", "expected"),
    [
        (256, 64, 2048, 384, 8192, 0.036),
        (256, 64, 2048, 384, 16_384, 0.074),
        (1500, 100, 16_000, 512, 8192, 0.007),
        (1500, 100, 16_000, 512, 16_384, 0.015),
    ],
)
def test_little_of_a_micro_batch_is_padding_as_its_rows_have_similar_lengths(
    median: int, shortest: int, longest: int, count: int, max_tokens: int, expected: float
):
    """The shares in docs/benchmarks.md: mean of 8 updates, prompts of 150 tokens."""
    shares = []
    for seed in range(8):
        drawn = np.random.default_rng(seed).lognormal(np.log(median), 0.9, count)
        lengths = np.clip(drawn, shortest, longest).astype(int)
        groups = [make_group([1] * 150, make_completion([2] * n, 0.0)) for n in lengths]
        parts = split_rows([full_row(group) for group in groups], max_tokens)
        used = sum(row.num_tokens for part in parts for row in part)
        shares.append(1 - used / sum(len(part) * part[0].num_tokens for part in parts))
    assert np.mean(shares) == pytest.approx(expected, rel=0.15)


def test_prompts_are_shared_only_for_short_completions():
    cost = LayoutCost(per_token=1e6, per_pair=1e3)
    short = make_group([1] * 14, *[make_completion([1] * 7, 0.0)] * 24)
    long = make_group([1] * 200, *[make_completion([1] * 3000, 0.0)] * 24)

    assert choose_width(full_row(short), cost) > 1
    assert choose_width(full_row(long), cost) == 1
    assert choose_width(full_row(short, [0.0] * 24), cost) == 1


def test_a_long_completion_does_not_keep_the_others_from_sharing_their_prompt():
    cost = LayoutCost(per_token=1e6, per_pair=1e3)
    completions = [make_completion([token] * 7, 0.0) for token in range(2, 10)]
    mixed = full_row(make_group([1] * 14, *completions, make_completion([1] * 3000, 0.0)))
    rows = lay_out(mixed, cost)
    assert [len(row.samples) for row in rows if row.num_tokens > 1000] == [1]
    assert all(len(row.samples) > 1 for row in rows if row.num_tokens < 1000)
    laid_out = [sample for row in rows for sample in row.samples]
    assert sorted(map(id, laid_out)) == sorted(map(id, mixed.samples))
    assert lay_out(full_row(make_group([1] * 14, LONG), [0.0]), cost) == []


def test_the_layout_of_a_batch_changes_neither_log_probabilities_nor_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Groups that share their prompts, one that has a long completion, and one that cannot."""
    monkeypatch.setattr(rows_file, "MAX_PACKED_TOKENS", 40)
    short = [make_completion([token, token + 1, 5], 0.0) for token in range(1, 7)]
    groups = [
        make_group([1] * 12, *short),
        make_group([2] * 12, *short[:4], make_completion([3, 4] * 12, 0.0)),
        make_group([3] * 30, *short),
    ]
    policy = float64_policy(tmp_path)
    micro_batches = MicroBatches(policy, LearnerConfig(device="cpu"), context_length=64)
    parts = micro_batches.of([full_row(group) for group in groups], policy_version=0)
    assert {part.mask_B1LL is None for part in parts} == {False, True}

    assert_equal_results(policy, [batch_of(groups, 1)], parts)


def float64_policy(folder: Path) -> Policy:
    """In float64, so that the order of sums changes nothing: only log-softmax is in float32."""
    return Policy(load_model(save_tiny_llama(folder), device="cpu"), temperature=0.7).double()


def score(policy: Policy, batch: MicroBatch) -> list[tuple[int, int, float]]:
    """(target, advantage, log pi) of every token, in an order independent of the layout."""
    logprobs_N, _ = policy(in_precision_of(policy, batch))
    targets_N = batch.target_ids_D[batch.pair_index_N]
    rows = zip(targets_N, batch.advantages_N, logprobs_N, strict=True)
    return sorted((int(t), int(a), p.item()) for t, a, p in rows)


def loss_and_gradients(
    policy: Policy, batches: Sequence[MicroBatch]
) -> tuple[float, list[torch.Tensor]]:
    """Of the mean over all tokens."""
    policy.zero_grad()
    loss, num_tokens = 0.0, sum(len(batch.pair_index_N) for batch in batches)
    for batch in batches:
        logprobs_N, _ = policy(in_precision_of(policy, batch))
        part = ((batch.advantages_N - 2.5) * logprobs_N).sum() / num_tokens
        part.backward()
        loss += part.item()
    return loss, [p.grad.clone() for p in policy.parameters() if p.grad is not None]


def in_precision_of(policy: Policy, batch: MicroBatch) -> MicroBatch:
    """Attention needs a mask in the dtype of the weights."""
    if batch.mask_B1LL is None:
        return batch
    return replace(batch, mask_B1LL=batch.mask_B1LL.to(next(policy.parameters()).dtype))


def assert_equal_results(
    policy: Policy, ones: Sequence[MicroBatch], others: Sequence[MicroBatch]
) -> None:
    """Equal log-probabilities, loss and gradients, to 1e-6."""
    first, second = (
        sorted(value for batch in batches for value in score(policy, batch))
        for batches in (ones, others)
    )
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, abs=TOLERANCE, rel=0)
    (loss, gradients), (other_loss, other_gradients) = (
        loss_and_gradients(policy, batches) for batches in (ones, others)
    )
    assert loss == pytest.approx(other_loss, abs=TOLERANCE, rel=0)
    for one, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


def alike_groups(seed: int) -> list[Group]:
    """Groups of completions of two token ids, most of which begin alike or are equal."""
    rng = np.random.default_rng(seed)
    return [
        make_group(
            [3] * (index + 1),
            *[
                make_completion(rng.integers(5, 7, rng.integers(1, 6)).tolist(), 0.0)
                for _ in range(9)
            ],
        )
        for index in range(3)
    ]


@pytest.mark.parametrize("width", [2, 4, 9])
@pytest.mark.parametrize("seed", range(3))
def test_shared_tokens_preserve_log_probabilities_and_gradients(
    tmp_path: Path, width: int, seed: int
):
    policy = float64_policy(tmp_path)
    separate, shared = (batch_of(alike_groups(seed), each) for each in (1, width))

    if width == 9:
        assert len(shared.target_ids_D) < 0.8 * len(shared.pair_index_N)
    assert_equal_results(policy, [separate], [shared])


@pytest.mark.parametrize("width", [2, 3, 6])
def test_shared_prompts_preserve_log_probabilities_and_gradients(tmp_path: Path, width: int):
    policy = float64_policy(tmp_path)
    groups = random_groups(1, num_groups=4)
    separate, shared = batch_of(groups, 1), batch_of(groups, width)

    assert shared.input_ids_BL.numel() < separate.input_ids_BL.numel()
    assert_equal_results(policy, [separate], [shared])


def test_log_probabilities_match_separate_sequences_at_the_temperature(tmp_path: Path):
    model = load_model(save_tiny_llama(tmp_path), device="cpu")
    batch = batch_of([make_group([1, 2], LONG, SHORT)], width=2)

    logprobs_N, entropies_N = Policy(model, temperature=0.5)(batch)

    expected, entropy = [], []
    for prompt, completion in (([1, 2], [5, 6, 7]), ([1, 2], [8, 9])):
        logits_LV = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        for index, token in enumerate(completion):
            logprobs_V = (logits_LV[len(prompt) + index - 1] / 0.5).log_softmax(-1)
            expected.append(logprobs_V[token].item())
            entropy.append(-sum(math.exp(p) * p for p in logprobs_V.tolist()))
    assert logprobs_N.tolist() == pytest.approx(expected, abs=1e-5)
    assert entropies_N.tolist() == pytest.approx(entropy, abs=1e-5)


def test_chunked_logits_give_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    policy, batch = float64_policy(tmp_path), batch_of(random_groups(2), 3)
    reference, (loss, gradients) = score(policy, batch), loss_and_gradients(policy, [batch])

    monkeypatch.setattr(policy_file, "MAX_LOGITS", 4 * VOCABULARY)

    for one, other in zip(score(policy, batch), reference, strict=True):
        assert one == pytest.approx(other, abs=TOLERANCE, rel=0)
    chunked_loss, chunked = loss_and_gradients(policy, [batch])
    assert chunked_loss == pytest.approx(loss, abs=TOLERANCE, rel=0)
    for one, other in zip(chunked, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


def test_under_autocast_the_head_gradients_of_chunks_add_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rounding of the parts to bfloat16 leaves 0.2 %; a sum in bfloat16 would be wrong by 2 %."""
    model = load_model(save_tiny_llama(tmp_path, tie_word_embeddings=False), device="cpu")
    policy, batch = Policy(model, temperature=1.0), batch_of(random_groups(2, num_groups=30), 1)
    policy.has_bfloat16 = True  # computes in bfloat16 also on a CPU
    head = output_head(model).weight

    def head_gradient(positions_per_chunk: int) -> torch.Tensor:
        monkeypatch.setattr(policy_file, "MAX_LOGITS", positions_per_chunk * VOCABULARY)
        loss_and_gradients(policy, [batch])
        assert head.grad is not None and head.grad.dtype == torch.float32
        return head.grad.clone()

    in_one_chunk = head_gradient(1000)
    assert 500 < len(batch.target_ids_D) < 1000
    difference = head_gradient(1) - in_one_chunk
    assert difference.norm() < 0.005 * in_one_chunk.norm()


def test_the_quickstart_model_shares_prompts(tmp_path: Path):
    model = load_model(
        save_tiny_llama(tmp_path, hidden_size=128, intermediate_size=344, num_hidden_layers=4),
        device="cpu",
    )
    group = make_group([1] * 14, *[make_completion([1] * n, 0.0) for n in (4, 5, 6, 8, 9, 10)] * 4)
    assert check_policy(Policy(model, temperature=1.0), None)
    assert choose_width(full_row(group), layout_cost(model)) in (8, 12, 24)
