"""Whole runs as a user starts them: their output files, and their error messages."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from speed_async.environments.arithmetic import ArithmeticTask
from tests.fakes.paths import MODEL
from tests.fakes.run_process import resume_train, start_torchrun, start_train, write_config

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


def test_train_writes_config_metrics_summary_plot_and_a_loadable_checkpoint(
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
    # Without a terminal: one line per step, then the summary.
    assert sum(line.startswith("step ") for line in out.splitlines()) == 3
    assert "balanced    yes" in out.split("run ended", 1)[1]
    assert run.processes() == {}


def test_model_that_transformers_refuses_to_save_is_trained_saved_and_resumed(
    tmp_path: Path,
) -> None:
    """Sampling flags with do_sample = False: transformers loads the model but cannot save it."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    flags = model / "generation_config.json"
    refused = json.loads(flags.read_text()) | {"do_sample": False, "temperature": 0.6}
    flags.write_text(json.dumps(refused))
    arguments = ("--learner.checkpoint_every", "1", "--run.updates", "2")
    run = start_train(tmp_path, *arguments, config=write_config(tmp_path, model=model))
    status, _, err = run.finish()
    assert status == 0, err
    run = resume_train(run, "--run.updates", "3")
    status, _, err = run.finish()
    assert status == 0, err
    saved = run.folder / "checkpoints" / "version-000003" / "generation_config.json"
    assert json.loads(saved.read_text()) == refused


def test_torchrun_trains_with_two_actors(tmp_path: Path) -> None:
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
    run = start_train(tmp_path, "--run.updates", "100000", "--evaluate.every", "1")
    run.wait_for_steps(2)
    run.wait_for("a second evaluation", lambda: len(run.events("evaluation")) > 1)
    run.interrupt()
    status, out, _ = run.finish()
    assert status == 130
    # The stop is acknowledged at once; the run then ends neither completed nor failed.
    progress, closing = out.split("run ended: ", 1)
    assert "a second Ctrl-C ends the run immediately" in progress
    assert closing.startswith("stopped by a signal\n")
    assert f"\n  resume      speed-async train --resume {run.folder}\n" in closing
    [end] = run.events("end")
    assert (end["outcome"], end["ok"]) == ("stopped", False)
    summary = run.summary()
    assert (summary["outcome"], summary["completed"]) == ("stopped", False)
    # The last measured accuracy is shown although the last version was not evaluated.
    last = run.events("evaluation")[-1]
    version, accuracy = last["policy_version"], 100 * last["accuracy"]
    assert f"-> {accuracy:.1f} %" in closing
    if summary["accuracy_after"] is None:
        assert f"points) at version {version}, the last one measured" in closing
    assert summary["ledger"]["closes"] is True
    assert summary["policy_version"] >= 2
    saved = run.folder / "checkpoints" / f"version-{summary['policy_version']:06d}"
    assert (saved / "model.safetensors").is_file()
    assert run.processes() == {}


def test_second_ctrl_c_ends_the_run_immediately_and_it_can_be_resumed(
    tmp_path: Path,
) -> None:
    """SIGINT is sent to the leading learner, as the launcher forwards it."""
    slow_drain = ("--cluster.drain_timeout_s", "60", "--learner.checkpoint_every", "1")
    run = start_train(tmp_path, "--run.updates", "100000", *slow_drain)
    run.wait_for_steps(2)
    learner = run.learner()
    os.kill(run.child("actor"), signal.SIGSTOP)  # the actor cannot drain
    os.kill(learner, signal.SIGINT)
    run.wait_for_event("a stop", lambda values: values["phase"] in ("stopping", "draining"))
    began_s = time.monotonic()
    while learner in run.processes():
        assert time.monotonic() - began_s < 30  # less than the drain timeout of 60 s
        with contextlib.suppress(ProcessLookupError):
            os.kill(learner, signal.SIGINT)
        time.sleep(0.25)
    status, out, _ = run.finish()
    assert status == 130
    assert out.endswith(
        "stopped immediately by a second Ctrl-C, without a final checkpoint and summary\n"
        f"  resume      speed-async train --resume {run.folder}\n"
    )
    assert not (run.folder / "summary.json").exists()
    run.wait_for_no_process()
    status, _, err = resume_train(run, "--run.updates", str(run.versions()[-1] + 1)).finish()
    assert status == 0, err


def test_run_stopped_before_its_first_update_reports_the_accuracy_without_a_change(
    tmp_path: Path,
) -> None:
    run = start_train(tmp_path, "--run.updates", "100000")
    run.wait_for("the first evaluation", lambda: run.events("evaluation"))
    os.kill(run.learner(), signal.SIGINT)
    _, out, _ = run.finish()
    if run.summary()["policy_version"] == 0:
        assert "at version 0, the only one measured" in out
        assert "points" not in out


def data_file(folder: Path, *answers: str) -> tuple[str, ...]:
    """Overrides for a task of additions with these answers."""
    rows = [{"prompt": f"{n}+{n}=", "answer": answers[n % len(answers)]} for n in range(100)]
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return ("--task.name", "jsonl", "--task.path", str(path), "--task.num_held_out", "4")


def test_run_without_rewards_ends_as_nothing_learned_with_a_diagnosis(tmp_path: Path) -> None:
    options = data_file(tmp_path, "never")
    run = start_train(tmp_path, *options, "--algorithm", "rloo", "--run.updates", "40")
    status, out, err = run.finish()
    assert status == 3, err
    closing = out.split("run ended: ", 1)[1]
    assert closing.startswith("nothing was learned: of 40 updates, 40 had no gradient; no reward")
    assert "  diagnosis   no reward: none of the last " in closing
    [end] = run.events("end")
    assert (end["outcome"], end["ok"]) == ("nothing_learned", False)
    summary = run.summary()
    assert (summary["outcome"], summary["completed"]) == ("nothing_learned", True)
    assert "no_reward" in [diagnosis["what"] for diagnosis in summary["diagnoses"]]
    # The reward is measured and 0; there is no gate.
    assert run.events("step")[-1]["reward_mean"] == 0.0
    assert run.events("step")[-1]["gate_acceptance"] is None
    assert run.processes() == {}


def test_run_with_only_truncated_completions_names_the_limit_in_its_last_line(
    tmp_path: Path,
) -> None:
    run = start_train(tmp_path, "--actors.max_new_tokens", "1", "--cluster.stall_timeout_s", "20")
    status, out, err = run.finish()
    assert status == 1
    assert out.endswith(f"  resume      speed-async train --resume {run.folder}\n")
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: buffer service: no batch could be filled within 20 s")
    assert "completions are truncated: 512 of the last 512 reached a length limit" in last
    assert "raise actors.max_new_tokens (now 1)" in last


def test_without_a_gate_the_step_reward_covers_whole_groups(tmp_path: Path) -> None:
    run = start_train(tmp_path, "--algorithm", "rloo", "--run.updates", "4")
    status, _, err = run.finish()
    assert status == 0, err
    steps = run.events("step")
    assert any(step["trained_reward_mean"] > 0 for step in steps)
    assert any(step["reward_mean"] > 0 for step in steps)
    assert {step["gate_acceptance"] for step in steps} == {None}
    assert "time/sync_s" not in steps[0]
    assert run.summary()["gate_acceptance"] is None


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1])
def test_scheduler_signals_drain_the_run(tmp_path: Path, how: signal.Signals) -> None:
    run = start_train(tmp_path, "--run.updates", "100000")
    run.wait_for_steps(1)
    run.process.send_signal(how)
    status, _, _ = run.finish()
    assert status == 130
    assert run.summary()["ledger"]["closes"] is True
    assert run.processes() == {}


@pytest.mark.parametrize("victim", ["actor", "engine"])
def test_killed_actor_is_restarted_and_the_run_completes(tmp_path: Path, victim: str) -> None:
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


def test_killed_service_recovers_from_its_journal_and_actors_keep_their_incarnation(
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


def test_killed_service_without_a_journal_ends_the_run_and_is_named_last(
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


def test_actor_error_is_the_last_line_printed(tmp_path: Path) -> None:
    """A fault that only transformers detects when the actor loads the tokenizer."""
    model = tmp_path / "invalid_tokenizer"
    model.mkdir()
    for source in MODEL.iterdir():
        (model / source.name).write_bytes(source.read_bytes())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["padding_side"] = "up"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    run = start_train(tmp_path, config=write_config(tmp_path, model=model))
    status, out, err = run.finish()
    assert status == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: actor-1: ")
    assert "has no usable tokenizer" in last
    assert "Traceback" not in out + err
    assert run.processes() == {}


def test_version_that_fails_its_canary_ends_the_run_with_the_canary_error(
    tmp_path: Path,
) -> None:
    """The two roles compute the same forward pass in different orders: their float32 sums differ
    in the last digits, which exceeds this tolerance."""
    overrides = ["--weights.canary_tolerance", "1e-12", "--actors.max_restarts", "1"]
    run = start_train(tmp_path, *overrides, "--run.updates", "100000")
    status, out, err = run.finish()
    assert status == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: actor-1: died 2 times")
    # All groups are of version 0: the staleness bound limits the learner to version 3.
    assert re.search(r"actor-1: policy version [123] is refused, its canary failed", last)
    assert "the tolerance of 1e-12" in last
    assert "use one model folder for all roles, or raise that field" in last
    assert "warning actor-1.0 did not apply the weights: policy version 1 is refused" in out
    assert "WeightSyncError: policy version 1" in (run.folder / "logs/actor-1.log").read_text()
    assert run.processes() == {}


def test_port_in_use_is_reported_with_its_field(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = start_train(tmp_path, "--cluster.service_port", str(port))
        status, _, err = run.finish()
    assert status == 1
    assert err.strip().splitlines()[-1].startswith("error: config field 'cluster.service_port'")
    assert run.processes() == {}


def test_prompts_longer_than_the_context_count_as_failed_and_the_rest_is_trained_on(
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
    status, out, _ = run.finish()
    assert status == 130
    ledger = run.summary()["ledger"]
    assert ledger["failures"]["prompt"] >= 1
    assert "tokens and the context holds" in ledger["failure_examples"]["prompt"]
    assert "first: prompt: the prompt has 50" in re.sub(r"\s+", " ", out)
    assert run.summary()["ledger"]["closes"] is True


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--learner.lrr", "1"], "error: config field 'learner.lrr'"),
        (["--buffer.credits", "1"], "error: config field 'buffer.credits' = 1"),
        (["--task.name", "jsonl", "--task.path", "none.jsonl"], "no such file"),
    ],
)
def test_invalid_config_is_rejected_in_one_line_before_torch_loads(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    arguments = ["train", str(write_config(tmp_path)), *overrides]
    code = (
        "import sys\nfrom speed_async.cli import main\n"
        f"sys.argv = ['speed-async', *{arguments!r}]\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1
    assert message in done.stderr
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0
    assert done.stdout.strip().endswith("[]")
