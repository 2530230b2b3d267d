"""A whole run with every option of an update that is off by default."""

from pathlib import Path

from tests.fakes.run_process import start_train

OPTIONS = {
    "learner.passes": "2",
    "learner.minibatches": "2",
    "learner.lr_schedule": "cosine",
    "learner.min_lr_share": "0.1",
    "learner.warmup_updates": "2",
    "learner.adam_beta2": "0.99",
    "learner.lora_rank": "4",
    "learner.lora_alpha": "8",
    "objective.correction": "token_tis",
    "objective.mask_truncated": "true",
    "objective.kl": "k1",
    "objective.kl_coefficient": "0.01",
    "objective.entropy_coefficient": "0.001",
}
UPDATES = 6


def test_a_run_counts_its_optimizer_updates_and_measures_the_reference(tmp_path: Path) -> None:
    options = [part for name, value in OPTIONS.items() for part in (f"--{name}", value)]
    scripted = ["--actors.engine", "scripted", "--task.name", "scripted"]
    run = start_train(tmp_path, *scripted, *options, "--run.updates", str(UPDATES))
    status, _, err = run.finish()
    assert status == 0, err
    summary = run.summary()
    assert (summary["policy_version"], summary["optimizer_updates"]) == (UPDATES, 4 * UPDATES)
    assert summary["skipped_updates"] == 0
    assert summary["ledger"]["groups"]["trained"] == 2 * UPDATES
    steps = run.events("step")
    assert [step["optimizer_updates"] for step in steps] == [4 * n for n in range(1, UPDATES + 1)]
    assert steps[0]["reference_kl_k3"] < steps[-1]["reference_kl_k3"]
    assert steps[1]["lr"] == max(step["lr"] for step in steps)
    assert steps[-1]["lr"] < steps[-2]["lr"]
