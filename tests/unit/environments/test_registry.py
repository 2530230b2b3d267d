"""Creation of tasks from `[task]`, and errors for invalid sections."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from speed_async.config.checks.task import known_tasks
from speed_async.config.sections.task import TaskConfig
from speed_async.environments.registry import make_task
from speed_async.errors import ConfigError


def config_error(config: TaskConfig) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        make_task(config)
    return caught.value


def test_unknown_name_raises_with_the_known_names() -> None:
    error = config_error(TaskConfig(name="arithmetics"))
    assert error.field == "task.name"
    assert error.value == "arithmetics"
    assert "did you mean arithmetic?" in str(error)
    for name in known_tasks():
        assert name in str(error)


@pytest.mark.parametrize("name", ["reasoning_gym", "reasoning_gym:"])
def test_reasoning_gym_requires_a_data_set(name: str) -> None:
    assert "add a data set after the colon" in str(config_error(TaskConfig(name=name)))


def test_jsonl_requires_a_path() -> None:
    error = config_error(TaskConfig(name="jsonl"))
    assert (error.field, error.value) == ("task.path", None)


def test_jsonl_task_is_created_from_the_section(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(6)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    config = TaskConfig(name="jsonl", path=str(path), match="numeric", num_held_out=2)
    task = make_task(config)
    assert (len(task.train_prompts), len(task.held_out_prompts)) == (4, 2)
    prompt = task.train_prompts[0]
    assert task.score(prompt, f"that makes {prompt.answer}.0") == 1.0


@pytest.mark.xdist_group("reasoning gym")
def test_reasoning_gym_task_is_created_from_the_section() -> None:
    pytest.importorskip("reasoning_gym")
    config = TaskConfig(
        name="reasoning_gym:chain_sum",
        options={"min_terms": 3, "max_terms": 3},
        num_prompts=4,
        num_held_out=2,
        seed=5,
    )
    task = make_task(config)
    assert (len(task.train_prompts), len(task.held_out_prompts)) == (4, 2)
    prompt = task.held_out_prompts[0]
    assert task.score(prompt, prompt.answer) == 1.0


def test_heavy_modules_are_imported_lazily(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p{i}", "answer": "1"}) for i in range(4)))
    program = (
        "import sys\n"
        "from speed_async.config.sections.task import TaskConfig\n"
        "from speed_async.environments.registry import make_task\n"
        f"make_task(TaskConfig(name='jsonl', path={str(path)!r}, num_held_out=1))\n"
        "heavy = ('torch', 'transformers', 'reasoning_gym', 'sympy', 'pebble')\n"
        "print([module for module in heavy if module in sys.modules])\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True
    )
    assert output.stdout.strip() == "[]"
