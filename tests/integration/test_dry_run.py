"""`speed-async train --dry-run`: what it prints, and that it starts and writes nothing."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from speed_async.config.load import load_config
from speed_async.launcher.attempt import begin_attempt
from tests.fakes.command_line import run_command
from tests.fakes.run_process import write_config

TWO_NODES = ("--nnodes", "2", "--cluster.host", "192.0.2.1", "--cluster.service_port", "29411")
SECURE = ("--cluster.keys", "keys")


def dry_run(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    """Run `train --dry-run` in `folder`; returns exit status and lines."""
    config = write_config(folder)
    status, out, err = run_command(folder, "train", str(config), "--dry-run", *arguments)
    assert err == ""
    assert [path.name for path in folder.iterdir()] == ["config.toml"]
    return status, out.splitlines()


def starting(lines: list[str], prefix: str) -> list[str]:
    return [line for line in lines if line.startswith(prefix)]


def test_dry_run_prints_what_the_run_would_do_and_creates_nothing(tmp_path: Path) -> None:
    settings = ("--learner.passes", "2", "--objective.kl_coefficient", "0.1")
    status, lines = dry_run(
        tmp_path, "--run.updates", "3", "--learner.groups_per_update", "5", *settings
    )
    assert (status, lines[-1]) == (0, "ok")
    assert (
        "  node 0: rank 0 is the learner, beside the buffer service, rank 1 is an actor"
        in (lines[2].partition(" (")[0])
    )
    [updates] = [line for line in lines if "3, each of 5 prompts x " in line]
    assert updates.endswith("; 2 optimizer updates each (learner.passes x learner.minibatches)")
    assert any("(20 bytes per parameter: weights, gradients, two moments, ref" in x for x in lines)
    assert "memory" in lines


def test_ranks_are_listed_by_node_and_what_other_machines_have_is_not_checked(
    tmp_path: Path,
) -> None:
    status, lines = dry_run(tmp_path, *TWO_NODES, *SECURE, "--nproc-per-node", "4")
    assert (status, lines[-1]) == (0, "ok, but 2 not checked here")
    assert starting(lines, "  node 1: ranks 4 to 7 are actors")
    keys, host = starting(lines, "not checked here: ")
    assert "'cluster.keys'" in keys
    assert "'cluster.host' = '192.0.2.1': the service cannot bind to it" in host


def test_another_node_resumes_while_the_learner_holds_the_lock_of_the_run(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ("--run.folder", str(tmp_path / "run")))
    attempt = begin_attempt(config, restarted_in=None, resume=False)
    options = (*TWO_NODES, "--cluster.security", "insecure", "--nproc-per-node", "2")
    resume = ("--resume", "run", "--dry-run", *options)
    status, out, err = run_command(tmp_path, "train", *resume, "--node-rank", "1")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].startswith("ok")
    status, _, err = run_command(tmp_path, "train", *resume, "--node-rank", "0")
    assert status == 1
    assert "is in progress" in err
    attempt.folder.release_lock(attempt.lock)


@pytest.mark.parametrize(
    ("learners", "per_node", "expected"),
    [
        (3, 4, ("ranks 0 to 2 are learners, beside the buffer service, rank 3 is an actor", "")),
        (3, 2, ("ranks 0 to 1 are learners, beside", "rank 2 is a learner, rank 3 is an actor")),
        (2, 3, ("ranks 0 to 1 are learners, beside", "ranks 3 to 5 are actors")),
    ],
)
def test_every_learner_rank_is_listed_on_its_node(
    tmp_path: Path, learners: int, per_node: int, expected: tuple[str, str]
) -> None:
    nodes = TWO_NODES if expected[1] else ()
    options = ["--cluster.learners", str(learners), "--nproc-per-node", str(per_node)]
    if nodes:
        options += [*SECURE, "--cluster.learner_port", "29412"]
    status, lines = dry_run(tmp_path, *nodes, *options)
    assert status == 0
    for node, text in enumerate(filter(None, expected)):
        assert starting(lines, f"  node {node}: {text}"), lines


def test_an_engine_that_is_not_installed_here_is_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec

    def without_vllm(name: str, *rest: Any) -> Any:
        return None if name == "vllm" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without_vllm)
    status, lines = dry_run(tmp_path, "--actors.engine", "vllm")
    assert status == 0
    assert "'actors.engine' = 'vllm': vLLM is not installed here" in lines[-2]


def test_a_mistake_is_an_error_beside_what_is_not_checked(tmp_path: Path) -> None:
    status, lines = dry_run(
        tmp_path, *TWO_NODES, *SECURE, "--gate.low", "0.9", "--gate.high", "0.1"
    )
    assert (status, lines[-1]) == (1, "1 error")
    assert len(starting(lines, "not checked here: ")) == 2
    assert len(starting(lines, "error: config field 'gate.low'")) == 1


def test_ranks_that_cannot_be_divided_among_the_nodes_are_an_error(tmp_path: Path) -> None:
    status, lines = dry_run(tmp_path, *TWO_NODES, *SECURE, "--cluster.actors", "4")
    assert (status, lines[-1]) == (1, "1 error")
    assert "5 ranks cannot be divided evenly among --nnodes 2" in lines[-2]


def test_check_counts_what_this_machine_lacks_as_an_error(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    arguments = (*TWO_NODES, *SECURE, "--nproc-per-node", "4")
    status, out, _ = run_command(tmp_path, "check", str(config), *arguments)
    assert (status, out.splitlines()[-1]) == (1, "2 errors")


def test_a_missing_section_is_reported_without_a_plan(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[task]\nname = "arithmetic"\n')
    status, out, _ = run_command(tmp_path, "train", str(config), "--dry-run")
    assert (status, out.splitlines()[-1]) == (1, "1 error")
    assert "'model' = None: is required; set model.path in the file" in out


def with_suite(folder: Path, path: str, task: str = "") -> Path:
    """A configuration with one evaluation suite; `task`: its own data set."""
    suite = f'\n[[evaluate.suites]]\nname = "own"\npath = "{path}"\n'
    config = write_config(folder)
    text = config.read_text()
    if task:
        head, _, rest = text.partition("[task]\n")
        rest = rest[rest.index("\n[") :]
        text = f'{head}[task]\nname = "dataset"\npath = "{task}"\nmatch = "math"\n{rest}'
    config.write_text(text + suite)
    return config


def test_prompts_of_suites_are_counted_and_compared_with_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    prompts = ["2+2=", "1+1=", "1+" * 400 + "1="]
    rows = [{"problem": text, "answer": "4"} for text in prompts] + [{"problem": "", "answer": "4"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = with_suite(tmp_path, "own.jsonl")
    status, out, _ = run_command(
        tmp_path, "train", str(config), "--dry-run", "--model.context_length", "64"
    )
    assert status == 0
    assert "evaluation suites\n  own: 3 prompts\n" in out
    assert "'own' suite: 3 prompts of " in out
    assert "warning: suite own: " in out and "3 of 4 rows are usable" in out
    assert "warning: 1 of 3 'own' suite prompts count as wrong (too long)" in out


def test_hub_data_that_is_not_in_the_cache_is_named_with_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    config = str(with_suite(tmp_path, "no/such-suite", task="no/such-set"))
    for command in (("train", "--dry-run"), ("check",)):
        status, out, _ = run_command(tmp_path, *command, config)
        found = starting(out.splitlines(), "not checked here: ")
        assert status == 0, out
        assert "config field 'task.path' = 'no/such-set': split 'train'" in found[0]
        assert "config field 'evaluate.suites' = 'no/such-suite': split 'train'" in found[1]
        assert "load it once where there is a connection" in found[0]
    status, _, err = run_command(tmp_path, "data", "show", config)
    assert status == 1
    assert err.splitlines()[-1].startswith("error: config field 'task.path' = 'no/such-set'")
