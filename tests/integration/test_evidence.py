"""The evidence, end to end and tiny: one run, its exact scores, its line, the report."""

import os
from pathlib import Path

import pytest

from benchmarks.evidence.experiment import MODEL, Experiment
from benchmarks.evidence.pass_rates import ExactScorer
from benchmarks.evidence.plan import BASE, EXPERIMENT, Setting
from benchmarks.evidence.records import Job, append, read_records
from benchmarks.evidence.report import MARKER, write_report

HORIZON_TOKENS = 5000


def test_a_run_is_scored_recorded_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    experiment = Experiment("real", num_train=240, num_scored=40, horizon_tokens=HORIZON_TOKENS)
    setting = Setting(lr=4e-4, clip=1.0, shape=24)
    job = Job(experiment=EXPERIMENT, spread="real", arm=BASE, setting=setting, seed=3)
    record = experiment.run(job)
    assert (record.key, record.ended) == (job.key, "horizon")
    assert {"learner", "engine", "actor", "service"} <= record.role_core_s.keys()
    first, *others = record.points
    rates = ExactScorer(MODEL, experiment.prompts.scored).pass_rates(MODEL)
    assert (first.version, first.tokens) == (0, 0)
    assert first.accuracy == pytest.approx(rates.mean(), abs=1e-6)
    assert [point.version for point in others] == [2 * i + 2 for i in range(len(others))]
    assert len({point.accuracy for point in record.points}) == len(record.points) >= 2
    for before, after in zip(record.points, others, strict=False):
        assert before.tokens < after.tokens
        assert before.wall_s < after.wall_s
        assert before.core_s < after.core_s
    # Synchronous updates of 384 completions of up to 6 tokens.
    assert 2 * 384 * 4 < others[0].tokens <= 2 * 384 * 6
    assert record.totals["completions"] > 0
    data = tmp_path / "evidence.jsonl"
    append(data, record)
    page = tmp_path / "time_to_accuracy.md"
    page.write_text(f"{MARKER}\n")
    write_report(read_records(data, EXPERIMENT), tmp_path)
    assert "0 tuning runs and 1 evaluation runs" in page.read_text()
    assert os.listdir(tmp_path).count("evidence.jsonl") == 1
    assert not list(tmp_path.glob("evidence-*"))  # checkpoints are deleted after scoring
