"""The scaling model: figures computed by hand, and an up-to-date document."""

from dataclasses import replace

import pytest

from benchmarks import scaling_constants as c
from benchmarks.scaling import DOCUMENT, LARGE, LENGTHS, MARKER, tables
from benchmarks.scaling_constants import MODELS, Lengths
from benchmarks.scaling_model import (
    DIRECT,
    FREE,
    PRESENT,
    RESPONSE,
    SHARDS,
    Engine,
    Plan,
    Split,
    best,
    ring_fill_s,
    transfer_s,
)

SEVEN, THIRTY_TWO, MIXTURE = MODELS


def test_the_document_contains_the_tables_of_the_script() -> None:
    _, marker, found = DOCUMENT.read_text().partition(MARKER)
    assert marker + found == tables(), "run `python -m benchmarks.scaling --write`"


def test_a_ring_fills_node_by_node() -> None:
    # 16 ranks on two nodes: one hop between nodes (512 KiB at 48 GB/s and 5 us), 14 inside
    # (512 KiB at 300 GB/s and 2 us).
    assert ring_fill_s(16) == pytest.approx(15.923e-6 + 14 * 3.7476e-6, rel=1e-3)


def test_one_sender_is_limited_by_its_card_and_every_bucket_fills_the_ring_again() -> None:
    # 470 GB at 0.65 x 48 GB/s are 15.06 s; 7,004 buckets of 64 MiB, each 0.25 ms of polling and
    # the fill of 193 ranks; 192 verdicts.
    expected_s = 15.064 + 7004 * (0.00025 + ring_fill_s(193)) + 192 * 0.000034
    assert transfer_s(PRESENT, MIXTURE, 64, 192) == pytest.approx(expected_s, rel=1e-3)


def test_shards_fill_the_cards_of_a_node_and_direct_writes_are_limited_by_the_learners_cards() -> (
    None
):
    bare_s = 470e9 / (0.65 * 300e9)
    assert transfer_s(SHARDS, MIXTURE, 64, 192) == pytest.approx(bare_s, abs=0.1)
    # 24 nodes of 470 GB each out of 64 cards of 48 GB/s, and the verdicts
    assert transfer_s(DIRECT, MIXTURE, 64, 192) == pytest.approx(3.672 + 0.0065, abs=0.001)


def test_the_longest_of_several_responses_follows_a_truncated_exponential() -> None:
    lengths = Lengths(1000.0)
    assert lengths.longest_of(1) == pytest.approx(1000, rel=1e-4)
    # Untruncated, the longest of 2 exponentials is 1.5 means; truncation at 4 means takes little.
    assert 1440 < lengths.longest_of(2) < 1500


def test_a_step_reads_all_weights_and_the_kv_cache_once() -> None:
    engine = Engine(model=SEVEN, lengths=LENGTHS[0])
    # Memory filled to 90 %: 72 GB at 0.6 x 3.35 TB/s, and 5 ms.
    assert engine.step_s(engine.max_running) == pytest.approx(0.03582 + 0.005, rel=1e-3)
    assert engine.max_running == pytest.approx((72e9 - 15.2e9) / (57344 * 4347.4), rel=1e-3)
    assert engine.running_at(engine.rate(20.0)) == pytest.approx(20.0)


def test_a_mixture_reads_only_the_selected_experts() -> None:
    # One token: 8 of 128 experts of 227.1 G parameters in all, and the other 7.9 G.
    assert MIXTURE.bytes_read(1) == pytest.approx(2 * (227.08e9 / 16 + 7.92e9), rel=1e-3)


def test_training_memory_determines_what_fits() -> None:
    # 18 bytes a parameter over 72 GB a GPU: 1.9, 8.2 and 58.75 GPUs, in whole nodes from 8 on.
    assert [model.learner_gpus for model in MODELS] == [2, 16, 64]
    assert best(Plan(model=MIXTURE, gpus=64, batch=LARGE, lengths=LENGTHS[0])) is None


def test_sending_weights_at_no_cost_gains_little_where_the_response_is_the_limit() -> None:
    plan = Plan(model=SEVEN, gpus=1024, batch=LARGE, lengths=LENGTHS[0])
    present, free = best(plan), best(replace(plan, scheme=FREE))
    assert present is not None and free is not None
    assert present.limit == RESPONSE
    assert free.update_s > 0.98 * present.update_s
    wide = best(replace(plan, staleness=8))
    assert wide is not None and wide.update_s < 0.5 * present.update_s


def test_a_group_finishes_within_the_window_and_the_learner_has_its_time() -> None:
    split = Split(Plan(model=SEVEN, gpus=256, batch=LARGE, lengths=LENGTHS[0]), 64)
    assert split.limit == RESPONSE
    taken_s = split.group_at(split.update_s) + split.learner_s
    assert taken_s == pytest.approx((c.MAX_STALENESS + 0.5) * split.update_s, rel=1e-6)
    # 512 x 16 completions of 4,096 tokens: 6 x 7.6 G x 33.55 M over 64 GPUs at 40 % of 989 TFLOP/s
    assert split.train_s == pytest.approx(60.43, rel=1e-3)
