"""Makes one run of the plan: trains, scores its checkpoints exactly, and deletes them."""

import subprocess
import tempfile
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.evidence.pass_rates import ExactScorer, exact_only
from benchmarks.evidence.plan import (
    ARMS,
    DATA_SEED,
    NUM_SCORED,
    NUM_TRAIN,
    SPREADS,
    checkpoint_every,
    overrides,
)
from benchmarks.evidence.records import Job, Point, Record
from benchmarks.evidence.spreads import NUM_ANSWER_CHARACTERS, make_prompts
from benchmarks.evidence.training import CHECKPOINTS, train_ours, train_trl
from benchmarks.harness import QUICKSTART, ROOT
from speed_async.config.load import load_config
from speed_async.learner.checkpoint.store import checkpoint_folder

MODEL = QUICKSTART.parent / "model"


class Experiment:
    """The prompts of one spread, and the runs on them."""

    def __init__(
        self,
        spread: str,
        *,
        num_train: int = NUM_TRAIN,
        num_scored: int = NUM_SCORED,
        horizon_tokens: int | None = None,
    ) -> None:
        """The sizes are those of the plan, except in tests."""
        plan = SPREADS[spread]
        self._horizon_tokens = horizon_tokens or plan.horizon_tokens
        self.prompts = make_prompts(
            plan.spread,
            model_folder=MODEL,
            num_train=num_train,
            num_scored=num_scored,
            seed=DATA_SEED,
        )
        self._scorer = ExactScorer(MODEL, self.prompts.scored)

    def run(self, job: Job) -> Record:
        """Makes a run. Raises RunFailed if it counts for nothing."""
        arm = ARMS[job.arm]
        values = overrides(arm, job.setting, job.seed)
        exact_only(load_config(str(QUICKSTART), values), NUM_ANSWER_CHARACTERS)
        commit = _commit()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        with tempfile.TemporaryDirectory(prefix="evidence-") as temporary:
            prompts, folder = Path(temporary) / "prompts.jsonl", Path(temporary) / "run"
            self.prompts.write_train(prompts)
            trace = (train_trl if arm.trl else train_ours)(
                [str(QUICKSTART), *values],
                prompts=prompts,
                folder=folder,
                horizon_tokens=self._horizon_tokens,
                every=checkpoint_every(arm),
            )
            points = [
                Point(version=0, tokens=0, wall_s=0, core_s=0, accuracy=self._accuracy(MODEL))
            ]
            for each in trace.versions:
                checkpoint = checkpoint_folder(folder / CHECKPOINTS, each.version)
                if checkpoint.exists():  # not the last one of a run that failed while saving
                    points.append(
                        Point(
                            version=each.version,
                            tokens=each.tokens,
                            wall_s=each.wall_s,
                            core_s=each.core_s,
                            accuracy=self._accuracy(checkpoint),
                        )
                    )
        return Record(
            **{each.name: getattr(job, each.name) for each in fields(Job)},
            points=tuple(points),
            ended=trace.ended,
            commit=commit,
            started=started,
            prompts=self.prompts.digest,
            overrides=tuple(values),
            role_core_s=trace.role_core_s,
            process_s=trace.process_s,
            foreign_cores=trace.foreign_cores,
            totals=trace.totals,
        )

    def _accuracy(self, model_folder: Path) -> float:
        return round(float(self._scorer.pass_rates(model_folder).mean()), 6)


def _commit() -> str:
    """The commit of the repository, with `+` if tracked files of the code were modified."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    code = ["speed_async", "benchmarks/*.py", "benchmarks/evidence", "quickstart"]
    modified = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return git("rev-parse", "--short=10", "HEAD") + ("+" if modified else "")
