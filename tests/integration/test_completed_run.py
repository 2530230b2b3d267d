"""Two runs that complete, and what each leaves behind.

A whole run takes long to start, so each meets several conditions at once, and each test checks one.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.fakes.completed_run import MAY_SET_HOST_NAME, UPDATES, Completed
from tests.fakes.paths import MODEL
from tests.fakes.pickle_trap import SITECUSTOMIZE
from tests.fakes.run_process import DEADLINE_S, start, train_command, write_config
from tests.fakes.sample_keys import SAMPLE_KEYS

pytestmark = pytest.mark.xdist_group("completed run")

SUMMARY_KEYS = {
    "accuracy_before",
    "accuracy_after",
    "wall_s",
    "optimizer_updates",
    "completions_trained",
    "tokens_generated",
    "tokens_per_s",
    "gate_acceptance",
    "staleness_mean",
    "staleness_max",
    "ledger",
}


def test_train_writes_config_metrics_summary_and_plot(completed: Completed) -> None:
    run, summary = completed.run, completed.run.summary()
    assert set(summary) >= SUMMARY_KEYS
    assert summary["optimizer_updates"] == UPDATES
    assert summary["completions_trained"] == UPDATES * 2 * 4
    assert summary["ledger"]["closes"] is True
    assert summary["ledger"]["groups"]["in_flight"] == 0
    assert summary["staleness_max"] <= 2
    assert len(run.events("step")) == UPDATES
    assert summary["weights"]["failed"] == 0
    assert [event["policy_version"] for event in run.events("evaluation")] == [0, UPDATES]
    newest = run.events("evaluation")[-1]
    assert (newest["oldest_version"], newest["newest_version"]) == (UPDATES, UPDATES)
    assert json.loads((run.folder / "config.json").read_text())["gate"]["n_init"] == 2
    assert (run.folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    # Without a terminal: one line per step, then the summary.
    assert sum(line.startswith("step ") for line in completed.out.splitlines()) == UPDATES
    assert "balanced    yes" in completed.out.split("run ended", 1)[1]


def test_train_writes_samples(completed: Completed) -> None:
    written = (completed.run.folder / "samples.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    assert lines and all(set(line) == SAMPLE_KEYS | {"kind"} for line in lines)
    assert all(line["completion"].strip() == line["extracted"] for line in lines)


def test_under_nohup_sighup_is_ignored(completed: Completed) -> None:
    assert completed.run.summary()["policy_version"] == UPDATES


@pytest.mark.skipif(
    not MAY_SET_HOST_NAME,
    reason="no permission to create a namespace with another host name",
)
def test_unresolvable_host_name_causes_no_delay(completed: Completed) -> None:
    # Resolving the name would take ten minutes.
    assert completed.run.summary()["wall_s"] < 2 * DEADLINE_S


def test_checkpoint_loads_in_transformers_with_changed_weights(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        kind.from_pretrained(checkpoint) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert tokenizer.eos_token_id is not None
    assert model(**tokenizer("12+34=", return_tensors="pt")).logits.any()
    before = AutoModelForCausalLM.from_pretrained(MODEL).state_dict()
    assert any(not before[name].equal(tensor) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def trapped(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Completed, list[str]]]:
    """A run from a checkpoint with a learning rate of 0, whose reader of stdout exits early, as in
    `speed-async train ... | head -1`. The service and the actors have a trap for unpickling, and
    some completions kill their verifier. With the lines of the trap's log."""
    folder = tmp_path_factory.mktemp("trapped")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
        "TRAP_LOG": str(folder / "trap.log"),
        "TRAP_KILLS": "1",
    }
    command = train_command(
        write_config(folder, model=checkpoint), "--run.updates", "8", "--learner.lr", "0"
    )
    run = start(folder, command, environment)
    try:
        assert run.process.stdout is not None and run.process.stderr is not None
        assert run.process.stdout.readline().startswith("start ")
        run.process.stdout.close()
        err = run.process.stderr.read()
        assert run.process.wait(DEADLINE_S) == 0, err
        assert run.processes() == {}
        lines = (folder / "trap.log").read_text().splitlines()
        yield Completed(run=run, out="", err=err), lines
    finally:
        run.kill()


def test_run_completes_after_the_reader_of_its_output_exits(
    trapped: tuple[Completed, list[str]],
) -> None:
    assert trapped[0].err == "preflight checks passed\n"
    assert trapped[0].run.summary()["completed"] is True


def test_learning_rate_of_zero_changes_no_weight(
    trapped: tuple[Completed, list[str]], checkpoint: Path
) -> None:
    run = trapped[0].run
    assert run.summary()["optimizer_updates"] == 8
    trained = load_file(run.folder / "checkpoints" / "version-000008" / "model.safetensors")
    given = load_file(checkpoint / "model.safetensors")
    assert all((trained[name] == given[name]).all() for name in given)


def test_run_unpickles_nothing_and_survives_completions_that_kill_their_verifier(
    trapped: tuple[Completed, list[str]],
) -> None:
    completed, lines = trapped
    summary = completed.run.summary()
    assert summary["ledger"]["closes"] is True
    assert (summary["messages_refused"], summary["peers_muted"]) == (0, 0)
    assert [line for line in lines if "TRAPPED" in line] == []
    assert {line.split()[0] for line in lines} == {"actor"}  # results of its own verifiers
    written = (completed.run.folder / "failed" / "actor-1.jsonl").read_text()
    failed = [json.loads(line) for line in written.splitlines()]
    assert len(failed) == summary["verifier"]["error"]["completions"] > 0
    assert 0 < summary["ledger"]["failures"]["verifier error"] <= len(failed)
    fatal = [record for record in failed if record["prompt_id"] % 16 == 0]
    assert len(failed) - 1 <= len(fatal)  # pebble may attribute a repeated crash to another task
    assert all("ended its worker process" in record["error"] for record in fatal)
    # Both completions of a phase kill their worker, and each is recorded.
    assert {count % 2 for count in Counter(each["prompt_id"] for each in fatal).values()} == {0}
