"""The task `verifiers:<environment>`: prompts and scores from the process of an environment."""

import asyncio
import importlib.util
import os
import sys
from functools import partial
from pathlib import Path

import pytest

from speed_async.config.sections.task import TaskConfig
from speed_async.environments.registry import make_task
from speed_async.environments.scoring_source import scoring_files
from speed_async.environments.verifier import VerifierPool
from speed_async.errors import ConfigError, TaskError

VARIABLE = "SPEED_ASYNC_VERIFIERS_PYTHON"
PYTHON = os.environ.get(VARIABLE) or (
    sys.executable if importlib.util.find_spec("verifiers") else None
)
needs_verifiers = pytest.mark.skipif(
    PYTHON is None,
    reason=f"{VARIABLE} names no interpreter with 'verifiers>=0.3.1,<0.4', and this one has none",
)

ENVIRONMENT = """
import os, time
import verifiers as vf
from datasets import Dataset

def load_environment(num, evaluates=True, single=True):
    rows = [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(num)]

    def correct(completion, answer):
        text = completion[-1]["content"]
        if "hang" in text:
            time.sleep(1000)
        if "die" in text:
            os._exit(7)
        if "raise" in text:
            raise ValueError("unreadable")
        return float(answer in text.split())

    async def short(completion):
        print("no reply")
        return float(len(completion[-1]["content"]) < 12)

    return (vf.SingleTurnEnv if single else vf.ToolEnv)(
        dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:2]) if evaluates else None,
        rubric=vf.Rubric(funcs=[correct, short], weights=[1.0, 0.25]),
        system_prompt="Add.",
    )
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, which has the module of the environment."""
    (tmp_path / "doubling.py").write_text(ENVIRONMENT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def section(*, num_held_out: int = 2, **options: object) -> TaskConfig:
    return TaskConfig(
        name="verifiers:doubling",
        python=PYTHON,
        options={"num": 8, **options},
        num_prompts=5,
        num_held_out=num_held_out,
    )


@needs_verifiers
def test_prompts_are_those_of_the_environment_and_its_rubric_scores(folder: Path) -> None:
    task = make_task(section())
    assert [prompt.text for prompt in task.held_out_prompts] == ["Add.\n\n0+0=", "Add.\n\n1+1="]
    prompts = task.train_prompts
    assert [prompt.text for prompt in prompts] == [f"Add.\n\n{i}+{i}=" for i in range(2, 7)]
    assert prompts[0].answer == "4"
    assert folder / "doubling.py" in scoring_files(task)
    assert task.score(prompts[0], "it is 4") == 1.0
    assert task.score(prompts[0], "the sum is surely 4") == 0.8
    assert task.score(prompts[1], "it is 4") == 0.2
    assert task.extract("it is 4") == "it is 4"
    with pytest.raises(TaskError, match="unreadable"):
        task.score(prompts[0], "raise")
    with pytest.raises(TaskError, match=r"ended its process \(status 7\)"):
        task.score(prompts[0], "die")
    assert task.score(prompts[0], "it is 4") == 1.0


@needs_verifiers
def test_an_environment_that_hangs_is_killed_and_the_others_are_scored(folder: Path) -> None:
    config = section(evaluates=False)
    task = make_task(config)
    texts = [
        {prompt.text for prompt in part} for part in (task.train_prompts, task.held_out_prompts)
    ]
    assert (len(texts[0]), len(texts[1]), texts[0] & texts[1]) == (5, 2, set())
    prompt = task.train_prompts[0]

    async def verdicts() -> list[str]:
        async with VerifierPool(partial(make_task, config), 1, timeout_s=10.0) as pool:
            found = await pool.score(prompt, [prompt.answer, "hang", "raise"])
        return [verdict.outcome for verdict in found]

    assert asyncio.run(verdicts()) == ["scored", "timeout", "error"]


@needs_verifiers
def test_other_environments_and_too_few_prompts_are_refused(folder: Path) -> None:
    with pytest.raises(TaskError, match="it is a ToolEnv; only a SingleTurnEnv"):
        _ = make_task(section(single=False)).train_prompts
    with pytest.raises(ConfigError, match=r"num_held_out' = 7: .* has 8 prompts; set it to 6"):
        _ = make_task(section(evaluates=False, num_held_out=7)).train_prompts


def test_an_interpreter_without_the_environment_is_refused_with_the_remedy() -> None:
    config = TaskConfig(name="verifiers:no_such_environment", python=sys.executable)
    with pytest.raises(
        TaskError, match=r"'no_such_environment' .*: install it and 'verifiers>=0\.3"
    ):
        _ = make_task(config).train_prompts
    missing = TaskConfig(name="verifiers:any", python="no/such/python")
    with pytest.raises(ConfigError, match=r"'task.python' = 'no/such/python'.*correct its path"):
        _ = make_task(missing).train_prompts
