"""The GPU check, as far as a CPU can run it."""

import argparse

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_parts import PARTS
from benchmarks.gpu_update import equal_groups, expected_bytes, model_sizes, update_flops
from speed_async.launcher.preflight.memory_budget import activation_bytes, logits_bytes

OPTIONS = argparse.Namespace(device="cpu", size="0.8M", row_tokens=64, rows=8)


def test_flops_per_token_are_six_per_weight_and_causal_attention() -> None:
    hidden, layers, wide = 128, 4, 352
    layer = 4 * hidden * hidden + 3 * hidden * wide
    head = 32 * hidden
    norms = (2 * layers + 1) * hidden
    expected = 6 * (layers * layer + head + norms) + 6 * layers * hidden * 64
    assert update_flops("0.8M", 64) == expected


def test_the_formula_counts_parameters_activations_and_logits() -> None:
    sizes = model_sizes("1.5B")
    assert 1.5e9 < sizes.num_parameters < 1.6e9
    big = argparse.Namespace(size="1.5B", row_tokens=4096)
    assert expected_bytes(big, 8192) == (
        18 * sizes.num_parameters + activation_bytes(sizes, 8192) + logits_bytes(sizes, 8192)
    )


def test_all_rows_of_an_update_have_the_same_length() -> None:
    groups = equal_groups(OPTIONS)
    lengths = {
        len(group.prompt_token_ids) + completion.sampled.num_tokens
        for group in groups
        for completion in group.completions
    }
    assert lengths == {64}
    assert sum(len(group.completions) for group in groups) == OPTIONS.rows


@pytest.mark.parametrize(
    "part",
    [
        "update",
        "sharded",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("weights", "engine")),
    ],
)
def test_a_part_measures_something(part: str) -> None:
    for each in PARTS[part](OPTIONS):
        measured = each["measured"]
        assert isinstance(measured, float)
        assert measured > 0


def test_a_part_that_fails_or_takes_too_long_is_a_row_of_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unknown = argparse.Namespace(device="abacus")
    [wrong] = gpu_check.run_part("quickstart", unknown)
    monkeypatch.setitem(gpu_check.LIMITS_S, "matmul", 0.1)
    [late] = gpu_check.run_part("matmul", OPTIONS)
    lines = gpu_check.table([wrong, late], OPTIONS).splitlines()
    assert "failed: exit status 1: " in lines[-2]
    assert "'abacus'" in lines[-2]
    assert lines[-1] == "| matmul |  | failed: not done after 0 s |  |"
