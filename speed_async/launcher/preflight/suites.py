"""Checks the evaluation suites of a run: their data can be read."""

from collections.abc import Sequence

from speed_async.config.schema import Config
from speed_async.environments.dataset.rows import summary
from speed_async.environments.suites import suite_prompts, suite_rows
from speed_async.errors import SpeedAsyncError
from speed_async.launcher.preflight.findings import Findings
from speed_async.types import Prompt


def check_suites(config: Config, findings: Findings) -> dict[str, Sequence[Prompt]]:
    """The prompts of each suite that can be opened."""
    if any(getattr(error, "field", "") == "evaluate.suites" for error in findings.errors):
        return {}
    opened: dict[str, Sequence[Prompt]] = {}
    for suite in config.evaluate.suites:
        try:
            rows = suite_rows(suite)
        except SpeedAsyncError as error:
            findings.errors.append(error)
            continue
        if rows.report.unusable:
            findings.warnings.append(f"suite {suite.name}: {summary(suite.path, rows.report)}")
        opened[suite.name] = suite_prompts(rows, suite.num_prompts)
    if opened:
        counts = [f"{name}: {len(prompts):,} prompts" for name, prompts in opened.items()]
        findings.show("evaluation suites", counts)
    return opened
