"""`speed-async eval` and `compare` as processes, on a run folder with two equal checkpoints."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speed_async.config.load import load_config, save_config
from speed_async.evaluation.compare import compare
from speed_async.evaluation.records import read_records, samples_path
from speed_async.evaluation.results_file import read_results
from speed_async.launcher.evaluation.sampling import sample_seed
from tests.fakes.command_line import run_command
from tests.fakes.paths import MODEL, REPOSITORY

NUM_PROMPTS, NUM_SAMPLES = 48, 4
VERSIONS = ("version-000010", "version-000020")
WAIT_S = 300.0


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with the shipped model as both checkpoints."""
    folder = tmp_path / "run"
    overrides = ["--run.folder", str(folder), "--task.num_held_out", str(NUM_PROMPTS)]
    overrides += ["--evaluate.num_samples", str(NUM_SAMPLES)]
    config = load_config(REPOSITORY / "quickstart/config.toml", overrides)
    for version in VERSIONS:
        shutil.copytree(MODEL, folder / "checkpoints" / version)
    save_config(config, folder / "config.json")
    return folder


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "speed_async", "eval", str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_an_evaluation_continues_after_a_kill_without_repeating_a_sample(run_folder: Path) -> None:
    first, second = (run_folder / "evaluation" / version for version in VERSIONS)
    samples = samples_path(first, "held_out")
    process = start(run_folder, "--actors.slots", "4")
    ends_s = time.monotonic() + WAIT_S
    while num_lines(samples) < 10 and process.poll() is None and time.monotonic() < ends_s:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    kept = samples.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 10 <= kept.count(b"\n") < NUM_PROMPTS * NUM_SAMPLES
    with samples.open("ab") as file:
        file.write(b'{"prompt_id": 4')  # killed while it wrote

    process = start(run_folder)
    out, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, error
    assert samples.read_bytes().startswith(kept)
    expected = {(i, j) for i in range(NUM_PROMPTS) for j in range(NUM_SAMPLES)}
    of_version = [read_records(samples_path(each, "held_out")) for each in (first, second)]
    for records, folder in zip(of_version, (first, second), strict=True):
        assert {each.key for each in records} == expected
        assert num_lines(samples_path(folder, "held_out")) == len(expected)
        result = read_results(folder)["held_out"]
        passed = sum(each.passed for each in records) / len(expected)
        assert result["mean"]["value"] == pytest.approx(passed)
        assert result["is_complete"] and len(result["levels"]) == 5
    # Equal weights and seeds: neither the kill nor the number of slots changes the samples, except
    # where rounding decides.
    texts = [{each.key: each.text for each in records} for records in of_version]
    num_equal = sum(texts[0][key] == texts[1][key] for key in expected)
    assert num_equal >= 0.95 * len(expected)
    assert all(version in out for version in VERSIONS) and "mean@k" in out

    [difference] = compare(first, second).suites
    assert abs(difference.difference.value) < 0.02
    status, out, _ = run_command(run_folder, "compare", str(first), str(second))
    assert status == 0 and "held_out" in out and "B - A" in out


def test_refusals_name_the_remedy(run_folder: Path, tmp_path: Path) -> None:
    model = str(MODEL)
    status, _, error = run_command(tmp_path, "eval", "--model", model, "--suite", "mth500")
    assert status == 1 and "--suite mth500: unknown suite; did you mean math500?" in error
    _, _, error = run_command(tmp_path, "eval", "--model", model, "--suite", "math500")
    assert "data/math500 does not exist: `speed-async data prepare math500` makes it" in error
    _, _, error = run_command(tmp_path, "eval", "--model", model, "--suite", "a,b=c.jsonl")
    assert "--suite a: unknown suite" in error
    _, _, error = run_command(tmp_path, "eval", str(tmp_path))
    assert "is not a run folder" in error and f"--model {tmp_path}" in error
    _, _, error = run_command(tmp_path, "eval", str(run_folder), "--learner.lr", "1")
    assert "--learner.lr: an evaluation has no such option" in error
    _, _, error = run_command(tmp_path, "eval")
    assert "give a RUN_DIR, or --model DIR" in error
    arguments = ("--suite", "x", "--temperature", "0", "--samples", "2")
    _, _, error = run_command(tmp_path, "eval", "--model", model, *arguments)
    assert "--samples 2: at temperature 0 all samples of a prompt are equal" in error
    status, _, error = run_command(tmp_path, "compare", str(tmp_path), str(tmp_path))
    assert status == 1 and "has no results.json" in error


def test_seeds_of_samples_are_distinct() -> None:
    seeds = {sample_seed(s, i, j) for s in range(2) for i in range(50) for j in range(8)}
    assert len(seeds) == 800 and all(0 <= seed < 2**63 for seed in seeds)
    assert json.loads(json.dumps(list(seeds))) == list(seeds)
