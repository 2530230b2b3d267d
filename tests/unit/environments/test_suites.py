"""Suites of a run: their prompts, the fingerprint of all data, and their verifiers."""

import asyncio
import json
from pathlib import Path

import pytest

from speed_async.config.sections.evaluate import SuiteConfig
from speed_async.environments.arithmetic import ArithmeticTask
from speed_async.environments.suites import SuiteVerifiers, open_suites
from speed_async.environments.task import data_fingerprint, prompts_digest
from speed_async.types import Prompt
from tests.fakes.buffer_fixtures import make_config

ROWS = [
    {"problem": "What is 1/2 of 3?", "answer": "3/2"},
    {"problem": "What is 2 + 2?", "answer": "4"},
    {"problem": "What is 2 + 3?", "answer": "5"},
]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def suite(path: Path, name: str = "s", **fields: object) -> SuiteConfig:
    return SuiteConfig.model_validate({"name": name, "path": str(path), **fields})


def test_a_suite_has_the_first_prompts_of_its_source_in_its_format(path: Path) -> None:
    suites = open_suites([suite(path, num_prompts=2, format="{prompt} Box it.")])
    assert [(each.prompt_id, each.text, each.answer, each.held_out) for each in suites["s"]] == [
        (0, "What is 1/2 of 3? Box it.", "3/2", True),
        (1, "What is 2 + 2? Box it.", "4", True),
    ]
    assert len(open_suites([suite(path, num_prompts=9)])["s"]) == 3


def test_the_fingerprint_covers_the_prompts_of_the_suites(path: Path) -> None:
    task = ArithmeticTask(num_prompts=3, num_held_out=1, max_digits=1, seed=0)
    seen = {data_fingerprint(task, {})}
    for chosen in ([suite(path)], [suite(path, num_prompts=2)], [suite(path, "other")]):
        seen.add(data_fingerprint(task, open_suites(chosen)))
    assert len(seen) == 4


def test_the_stored_digest_of_a_suite_is_that_of_its_prompts(path: Path) -> None:
    whole = open_suites([suite(path)])["s"]
    part = open_suites([suite(path, num_prompts=2)])["s"]
    assert prompts_digest(whole) == prompts_digest(list(whole))
    assert prompts_digest(part) == prompts_digest(list(whole)[:2]) == prompts_digest(whole[:2])


def test_each_suite_is_scored_by_its_own_match(path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    suites = [
        {"name": "values", "path": str(path), "match": "math"},
        {"name": "texts", "path": str(path), "match": "exact"},
    ]
    config = make_config(str(tmp_path), evaluate={"suites": suites})
    prompt = Prompt(prompt_id=0, text="p", answer="3/2", held_out=True)

    async def scenario() -> dict[str, list[bool]]:
        async with SuiteVerifiers(config) as verifiers:
            completions = ["\\boxed{1.5}", "\\boxed{3/2}", "\\boxed{2}"]
            return {
                name: [each.passed for each in await scorer.score(prompt, completions)]
                for name, scorer in verifiers.by_suite.items()
            }

    verdicts = asyncio.run(asyncio.wait_for(scenario(), 240))
    assert verdicts == {"values": [True, True, False], "texts": [False, True, False]}
