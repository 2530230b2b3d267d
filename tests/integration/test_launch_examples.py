"""The scripts of examples/launch, with `--dry-run` and the environment of their schedulers."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes.paths import REPOSITORY

FOLDER = REPOSITORY / "examples" / "launch"
CONFIG = str(REPOSITORY / "quickstart" / "config.toml")
HEAD = "192.0.2.1"
ENGINE = ("--actors.engine", "torch")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """PATH with speed-async, and with Slurm's commands as they behave on the first node."""
    commands = {
        "speed-async": f'exec {sys.executable} -m speed_async "$@"',
        "scontrol": f'[ "$*" = "show hostnames node[0-1]" ] && printf "{HEAD}\\n192.0.2.2\\n"',
        "srun": 'export SLURM_NODEID="${NODE:-0}"; exec "$@"',
    }
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def run(command: list[str], environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("ok"), done.stdout
    return done.stdout


@pytest.mark.parametrize(("script", "actors"), [("one_gpu.sh", 1), ("one_node.sh", 7)])
def test_a_script_for_one_machine(
    script: str, actors: int, environment: dict[str, str], tmp_path: Path
) -> None:
    command = ["bash", str(FOLDER / script), CONFIG, *ENGINE, "--dry-run"]
    assert actors_in(run(command, environment, tmp_path)) == actors


@pytest.mark.parametrize("node", [0, 1])
def test_slurm_starts_a_launcher_on_each_node(
    node: int, environment: dict[str, str], tmp_path: Path
) -> None:
    slurm = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "NODE": str(node)}
    command = ["bash", str(FOLDER / "slurm.sh"), CONFIG, *ENGINE, "--dry-run"]
    out = run(command, environment | slurm, tmp_path)
    assert actors_in(out) == 15
    assert (HEAD in out) is (node == 0)  # which listens there, and is told that it cannot here


def test_the_job_set_starts_a_launcher_in_each_pod(
    environment: dict[str, str], tmp_path: Path
) -> None:
    [job] = job_set()["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod: dict[str, Any] = spec["template"]["spec"]
    [container] = pod["containers"]
    [text] = container["args"]
    assert spec["completions"] == spec["parallelism"] == 2
    assert spec["completionMode"] == "Indexed"  # sets JOB_COMPLETION_INDEX
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    mounted = {each["name"] for each in container["volumeMounts"]}
    assert mounted == {each["name"] for each in pod["volumes"]}
    dns_name = "speed-async-node-0-0.speed-async"
    assert dns_name in text
    text = text.replace(dns_name, HEAD).replace("my.toml", CONFIG).rstrip()
    command = [*container["command"], f"{text} {' '.join(ENGINE)} --dry-run"]
    out = run(command, environment | {"JOB_COMPLETION_INDEX": "0"}, tmp_path)
    assert actors_in(out) == 15


@pytest.mark.parametrize(("index", "what"), [("0", "--resume runs/default"), ("1", "my.toml")])
def test_only_the_first_pod_of_the_job_set_resumes_the_run_on_their_volume(
    index: str, what: str, environment: dict[str, str], tmp_path: Path
) -> None:
    [job] = job_set()["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    (tmp_path / "runs" / "default").mkdir(parents=True)
    (tmp_path / "runs" / "default" / "config.json").touch()
    command = [*container["command"], *container["args"]]
    out = arguments_of(command, environment | {"JOB_COMPLETION_INDEX": index}, tmp_path)
    assert out.startswith(f"train {what} --nnodes 2 --node-rank {index} ")


@pytest.mark.parametrize(("node", "what"), [("0", "--resume runs/default"), ("1", "my.toml")])
def test_slurm_resumes_on_the_first_node_only(
    node: str, what: str, environment: dict[str, str], tmp_path: Path
) -> None:
    slurm = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "NODE": node}
    command = ["bash", str(FOLDER / "slurm.sh"), "my.toml", "--run.updates", "9"]
    out = arguments_of(command, environment | slurm | {"RESUME": "runs/default"}, tmp_path)
    assert out.startswith(f"train {what} --nnodes 2 ")
    assert out.endswith(f" --run.updates 9 --node-rank {node} ")


def arguments_of(command: list[str], environment: dict[str, str], folder: Path) -> str:
    """The arguments with which the script starts speed-async, each followed by a space."""
    (folder / "bin" / "speed-async").write_text('#!/usr/bin/env bash\nprintf "%s " "$@"\n')
    return subprocess.run(
        command,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def job_set() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "jobset.yaml").read_text())


def actors_in(plan: str) -> int:
    """Actor ranks of all nodes in the output of --dry-run: rank 0 is the learner."""
    [last_rank] = re.findall(r"(\d+) (?:is an actor|are actors) ", plan)[-1:]
    return int(last_rank)
