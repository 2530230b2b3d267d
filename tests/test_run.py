"""Whole runs, as a user starts them: what they leave behind, and what they say when they cannot."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from run_process import MODEL, start_torchrun, start_train, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from speed_async.tasks.arithmetic import ArithmeticTask

pytestmark = pytest.mark.timeout(240)

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


def test_train_leaves_config_metrics_summary_picture_and_a_loadable_checkpoint(
    tmp_path: Path,
) -> None:
    run = start_train(tmp_path)
    status, out, err = run.finish()
    assert status == 0, err
    summary = run.summary()
    assert set(summary) >= SUMMARY_KEYS
    assert summary["optimizer_updates"] == 3
    assert summary["completions_trained"] == 3 * 2 * 4
    assert summary["ledger"]["closes"] is True
    assert summary["ledger"]["groups"]["in_flight"] == 0
    assert summary["staleness_max"] <= 2
    assert len(run.events("step")) == 3
    assert [event["policy_version"] for event in run.events("evaluation")] == [0, 3]
    assert json.loads((run.folder / "config.json").read_text())["gate"]["n_init"] == 2
    assert (run.folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = run.folder / "checkpoints" / "version-000003"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert AutoTokenizer.from_pretrained(checkpoint).eos_token_id is not None
    before = AutoModelForCausalLM.from_pretrained(MODEL).state_dict()
    assert any(not before[name].equal(tensor) for name, tensor in model.state_dict().items())
    # Without a terminal: a line for each step, and the summary last.
    assert sum(line.startswith("step ") for line in out.splitlines()) == 3
    assert "closes" in out.split("run ended", 1)[1]
    assert run.processes() == {}


def test_torchrun_takes_the_same_path_with_two_actors(tmp_path: Path) -> None:
    run = start_torchrun(tmp_path, 3)
    status, _, err = run.finish()
    assert status == 0, err
    assert run.summary()["ledger"]["closes"] is True
    assert {path.name for path in (run.folder / "logs").glob("actor-?.log")} == {
        "actor-1.log",
        "actor-2.log",
    }
    assert run.processes() == {}


def test_ctrl_c_drains_saves_and_leaves_no_process(tmp_path: Path) -> None:
    run = start_train(tmp_path, "--run.updates", "100000")
    run.wait_for_steps(2)
    run.interrupt()
    status, out, _ = run.finish()
    assert status == 130
    assert "stopped by a signal" in out
    summary = run.summary()
    assert summary["ledger"]["closes"] is True
    assert summary["policy_version"] >= 2
    saved = run.folder / "checkpoints" / f"version-{summary['policy_version']:06d}"
    assert (saved / "model.safetensors").is_file()
    assert run.processes() == {}


def test_sigterm_does_the_same(tmp_path: Path) -> None:
    run = start_train(tmp_path, "--run.updates", "100000")
    run.wait_for_steps(1)
    run.process.send_signal(signal.SIGTERM)
    status, _, _ = run.finish()
    assert status == 130
    assert run.summary()["ledger"]["closes"] is True
    assert run.processes() == {}


@pytest.mark.parametrize("victim", ["actor", "engine"])
def test_a_killed_actor_is_started_again_and_the_run_completes(tmp_path: Path, victim: str) -> None:
    run = start_train(tmp_path, "--run.updates", "12", "--weights.deadline_s", "5")
    run.wait_for_steps(2)
    os.kill(run.child(victim), signal.SIGKILL)
    status, out, err = run.finish()
    assert status == 0, err
    warned = [line for line in out.splitlines() if line.startswith("warning actor-1")]
    assert warned, out
    assert not any(".cc:" in line for line in warned)
    summary = run.summary()
    assert summary["optimizer_updates"] == 12
    assert summary["ledger"]["closes"] is True
    assert summary["ledger"]["failures"]["actor lost"] >= 1
    assert run.processes() == {}


def test_a_killed_service_goes_on_from_its_journal_and_nobody_else_is_replaced(
    tmp_path: Path,
) -> None:
    run = start_train(tmp_path, "--run.updates", "12")
    run.wait_for_steps(2)
    os.kill(run.child("service"), signal.SIGKILL)
    status, _, err = run.finish()
    assert status == 0, err
    summary = run.summary()
    assert summary["optimizer_updates"] == 12
    assert summary["ledger"]["closes"] is True
    assert "actor lost" not in summary["ledger"]["failures"]
    assert list(summary["actors"]) == ["actor-1.0"]
    assert run.processes() == {}


def test_a_killed_service_without_a_journal_ends_the_run_with_its_name_last(
    tmp_path: Path,
) -> None:
    forever = ("--run.updates", "100000", "--cluster.drain_timeout_s", "2")
    run = start_train(tmp_path, *forever, "--buffer.durability", "none")
    run.wait_for_steps(1)
    os.kill(run.child("service"), signal.SIGKILL)
    status, _, err = run.finish()
    assert status == 1
    assert err.strip().splitlines()[-1].startswith("error: buffer service")
    assert run.processes() == {}


def test_an_error_of_an_actor_is_the_last_thing_printed(tmp_path: Path) -> None:
    model = tmp_path / "no_eos"
    model.mkdir()
    for source in MODEL.iterdir():
        (model / source.name).write_bytes(source.read_bytes())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    run = start_train(tmp_path, config=write_config(tmp_path, model=model))
    status, out, err = run.finish()
    assert status == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "EOS" in last
    assert "Traceback" not in out + err
    assert run.processes() == {}


def test_a_version_that_fails_its_canary_ends_the_run_with_the_canary_s_words(
    tmp_path: Path,
) -> None:
    """The two roles lay the same forward pass out differently: their float32 sums differ in the
    last digits, which this tolerance does not forgive."""
    overrides = ["--weights.canary_tolerance", "1e-12", "--actors.max_restarts", "1"]
    run = start_train(tmp_path, *overrides, "--run.updates", "100000")
    status, out, err = run.finish()
    assert status == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: actor-1: died 2 times")
    # All groups are of version 0: staleness lets the learner get to version 3 by them, no further.
    assert re.search(r"actor-1: policy version [123] is refused, its canary failed", last)
    assert "the tolerance of 1e-12" in last
    assert "use one model folder for all roles, or raise that field" in last
    assert "warning actor-1.0 has not got the weights: policy version 1 is refused" in out
    assert "WeightSyncError: policy version 1" in (run.folder / "logs/actor-1.log").read_text()
    assert run.processes() == {}


def test_a_port_in_use_is_named_with_its_field(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = start_train(tmp_path, "--cluster.service_port", str(port))
        status, _, err = run.finish()
    assert status == 1
    assert err.strip().splitlines()[-1].startswith("error: config field 'cluster.service_port'")
    assert run.processes() == {}


def test_prompts_longer_than_the_context_are_counted_failed_and_the_rest_trains(
    tmp_path: Path,
) -> None:
    task = ArithmeticTask(num_prompts=60, num_held_out=8, max_digits=4, seed=0)
    prompts = [*task.train_prompts, *task.held_out_prompts]
    rows = [{"prompt": prompt.text, "answer": prompt.answer} for prompt in prompts]
    rows += [{"prompt": "9" * 500 + str(i), "answer": "1"} for i in range(20)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    overrides = ["--task.name", "jsonl", "--task.path", str(data), "--task.num_held_out", "4"]
    run = start_train(tmp_path, *overrides, "--run.updates", "100000")
    run.wait_for(
        "a failed group", lambda: any(event["groups_failed"] for event in run.events("step"))
    )
    run.interrupt()
    status, _, _ = run.finish()
    assert status == 130
    assert run.summary()["ledger"]["failures"]["prompt"] >= 1
    assert run.summary()["ledger"]["closes"] is True


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--learner.lrr", "1"], "error: config field 'learner.lrr'"),
        (["--buffer.credits", "1"], "error: config field 'buffer.credits' = 1"),
        (["--task.name", "jsonl", "--task.path", "none.jsonl"], "no such file"),
    ],
)
def test_a_bad_config_is_refused_in_one_line_before_torch_loads(
    tmp_path: Path, overrides: list[str], said: str
) -> None:
    arguments = ["train", str(write_config(tmp_path)), *overrides]
    code = (
        "import sys\nfrom speed_async.cli import main\n"
        f"sys.argv = ['speed-async', *{arguments!r}]\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["actor", "--help"]])
def test_help_loads_neither_torch_nor_zmq_nor_wandb(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom speed_async.cli import main\n"
        f"sys.argv = ['speed-async', *{arguments!r}]\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'zmq', 'wandb', 'vllm'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.strip().endswith("[]")
