"""Whole runs as a user starts them: their output files, and their error messages."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from speed_async.environments.arithmetic import ArithmeticTask
from tests.fakes.ended_run import drain
from tests.fakes.paths import MODEL
from tests.fakes.run_process import start_train, write_config

JSONL = ("--task.name", "jsonl", "--task.num_prompts", "4096", "--task.path")
"""The next argument is the data file. 4096 is the default, since a file has its own number."""


def data_file(folder: Path, *answers: str) -> tuple[str, ...]:
    """Overrides for a task of additions with these answers."""
    rows = [{"prompt": f"{n}+{n}=", "answer": answers[n % len(answers)]} for n in range(100)]
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return (*JSONL, str(path), "--task.num_held_out", "4")


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
    few = ("--actors.slots", "2")  # leaves CPU time to other tests until the deadline
    run = start_train(
        tmp_path, *few, "--actors.max_new_tokens", "1", "--cluster.stall_timeout_s", "10"
    )
    status, out, err = run.finish()
    assert status == 1
    assert out.endswith(f"  resume      speed-async train --resume {run.folder}\n")
    last = err.strip().splitlines()[-1]
    assert re.match(r"error: buffer service: no batch could be filled within 1\d s", last)
    assert "completions are truncated: 512 of the last 512 reached a length limit" in last
    assert "raise actors.max_new_tokens (now 1)" in last


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


def test_prompts_longer_than_the_context_count_as_failed_and_a_scheduler_s_signal_drains_the_run(
    tmp_path: Path,
) -> None:
    task = ArithmeticTask(num_prompts=60, num_held_out=8, max_digits=4, seed=0)
    prompts = [*task.train_prompts, *task.held_out_prompts]
    rows = [{"prompt": prompt.text, "answer": prompt.answer} for prompt in prompts]
    rows += [{"prompt": "9" * 500 + str(i), "answer": "1"} for i in range(20)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    overrides = [*JSONL, str(data), "--task.num_held_out", "4"]
    run = start_train(tmp_path, *overrides, "--run.updates", "100000")
    run.wait_for(
        "a failed group", lambda: any(event["groups_failed"] for event in run.events("step"))
    )
    out = drain(run, signal.SIGUSR1)
    ledger = run.summary()["ledger"]
    assert ledger["failures"]["prompt"] >= 1
    assert "tokens and the context holds" in ledger["failure_examples"]["prompt"]
    assert "first: prompt: the prompt has 50" in re.sub(r"\s+", " ", out)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--learner.lrr", "1"], "error: config field 'learner.lrr'"),
        (["--buffer.credits", "1"], "error: config field 'buffer.credits' = 1"),
        ([*JSONL, "none.jsonl"], "no such file"),
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


def test_a_killed_actor_is_reported_with_its_signal_and_log(tmp_path: Path) -> None:
    scripted = ["--actors.engine", "scripted", "--task.name", "scripted"]
    run = start_train(tmp_path, *scripted, "--run.updates", "100000")
    run.wait_for_steps(2)
    os.kill(run.child("actor"), signal.SIGKILL)
    warning = f"actor-1 died (SIGKILL, log: {run.folder / 'logs' / 'actor-1.log'}); its supervisor"
    run.wait_for_event("the warning", lambda values: warning in str(values["warning"]))
    assert f"warning {warning}" in drain(run, signal.SIGINT)
