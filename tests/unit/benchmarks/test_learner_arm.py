from pathlib import Path

import pytest

from benchmarks.learner_arm import hugging_face, ours, random_groups, save_random_llama


def test_both_arms_have_the_same_gradient_norm_in_every_update(tmp_path: Path) -> None:
    """As in the benchmark, which measures the second update."""
    save_random_llama("0.8M", tmp_path)
    updates = [random_groups(1, 2, 32, seed=1), random_groups(1, 2, 32, seed=7)]
    mine, plain = ours(tmp_path, 0), hugging_face(tmp_path, 4)
    norms = [[update(groups) for groups in updates] for update in (mine, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert norms[0][0] != pytest.approx(norms[0][1], rel=0.1)
