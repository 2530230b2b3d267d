"""Identity of a run's inputs by content: files, scoring code, and model folders of two nodes."""

import importlib
import importlib.metadata
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from speed_async.config.load import build_config
from speed_async.config.schema import Config
from speed_async.config.sections.model import ModelConfig
from speed_async.config.sections.task import RewardConfig
from speed_async.environments.registry import make_task
from speed_async.environments.rewards import reward_functions
from speed_async.environments.scoring_source import scoring_files
from speed_async.launcher.identity.content import (
    MIN_CACHED_BYTES,
    digest_files,
    digest_text,
    sample_digest,
)
from speed_async.launcher.identity.identity import DATA, SCORING, identify
from speed_async.launcher.identity.identity import MODEL as MODEL_NAME
from speed_async.launcher.identity.model_files import model_fingerprint
from tests.fakes.paths import MODEL


def config_of(**task: object) -> Config:
    small = {"num_prompts": 8, "num_held_out": 4}
    return build_config({"model": {"path": str(MODEL)}, "task": small | task})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


# --- files -------------------------------------------------------------------------------------


def test_large_file_is_read_again_only_when_it_was_modified(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(MIN_CACHED_BYTES))
    first = digest_files([path])
    forged = {
        name: type(found)(digest="cached", stamp=found.stamp) for name, found in first.items()
    }
    assert digest_files([path], forged)[str(path)].digest == "cached"
    times = path.stat()
    with path.open("r+b") as file:
        file.write(b"1")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # like a copy that preserves times
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    again = digest_files([path], forged)[str(path)].digest
    assert again not in ("cached", first[str(path)].digest)


def test_small_file_is_always_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"1")
    [(name, found)] = digest_files([path]).items()
    forged = {name: type(found)(digest="cached", stamp=found.stamp)}
    assert digest_files([path], forged) == {name: found}


def test_digest_depends_on_text_boundaries() -> None:
    assert digest_text("ab", "c") != digest_text("a", "bc") != digest_text("abc")


def test_sample_digest_detects_other_weights_of_the_same_size(tmp_path: Path) -> None:
    one, other, longer = (tmp_path / name for name in ("one", "other", "longer"))
    one.write_bytes(bytes(1_000_000))
    other.write_bytes(bytes(500_000) + b"1" * 500_000)
    longer.write_bytes(bytes(1_000_001))
    assert len({sample_digest(path) for path in (one, other, longer)}) == 3


# --- a model folder on two nodes ---------------------------------------------------------------

PLAIN = ModelConfig(path="of this machine")
WITH_TEMPLATE = ModelConfig(path="of this machine", chat_template=True)


def test_fingerprint_depends_on_model_files_only(model: Path) -> None:
    original = model_fingerprint(MODEL, WITH_TEMPLATE)
    assert model_fingerprint(model, WITH_TEMPLATE) == original
    (model / "README.md").write_text("notes")
    assert model_fingerprint(model, WITH_TEMPLATE) == original


def test_fingerprint_differs_when_settings_differ_but_not_with_the_path() -> None:
    original = model_fingerprint(MODEL, PLAIN)
    assert model_fingerprint(MODEL, PLAIN.model_copy(update={"path": "elsewhere"})) == original
    for change in ({"system_prompt": "Think."}, {"stop_tokens": ["="]}):
        assert model_fingerprint(MODEL, PLAIN.model_copy(update=change)) != original


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]
)
def test_fingerprint_differs_when_a_model_file_differs(model: Path, name: str) -> None:
    original = model_fingerprint(model, PLAIN)
    (model / name).write_bytes((model / name).read_bytes() + b" ")
    assert model_fingerprint(model, PLAIN) != original


def test_chat_template_affects_the_fingerprint_only_if_enabled(model: Path) -> None:
    original = [model_fingerprint(model, used) for used in (PLAIN, WITH_TEMPLATE)]
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "x"}))
    inside = [model_fingerprint(model, used) for used in (PLAIN, WITH_TEMPLATE)]
    (model / "chat_template.jinja").write_text("y")
    separate = [model_fingerprint(model, used) for used in (PLAIN, WITH_TEMPLATE)]
    assert original[0] == inside[0] == separate[0]
    assert len({original[1], inside[1], separate[1]}) == 3


def test_optimizer_state_of_a_checkpoint_is_not_part_of_the_model(model: Path) -> None:
    config = config_of(name="arithmetic")
    original = identify(config, run_id="r").things[MODEL_NAME].digest
    (model / "optimizer.safetensors").write_bytes(b"state")
    moved = config.model_copy(
        update={"model": config.model.model_copy(update={"path": str(model)})}
    )
    assert identify(moved, run_id="r").things[MODEL_NAME].digest == original


# --- scoring code ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arithmetic", "scripted", "jsonl"])
def test_scoring_files_are_the_task_module_and_its_imports(name: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i}?", "answer": str(i)} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = make_task(config_of(name=name, path=str(data)).task)
    names = {path.name for path in scoring_files(task)}
    assert Path(sys.modules[type(task).__module__].__file__ or "").name in names
    assert ("final_answer.py" in names) == (name == "jsonl")
    assert not names & {"registry.py", "verifier.py", "errors.py", "types.py"}


def test_scoring_files_of_a_user_task_include_its_local_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rules.py").write_text("def right(text): return text == '4'\n")
    (tmp_path / "my_task.py").write_text(
        "import numpy as np\nimport json\nfrom my_rules import right\n"
        "from speed_async.environments.final_answer import final_answer\n"
        "class MyTask:\n    def score(self, prompt, completion): return right(completion)\n"
    )
    (tmp_path / "my_reward.py").write_text("def bonus(**given): return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    task = importlib.import_module("my_task").MyTask()
    try:
        names = {path.name for path in scoring_files(task)}
        assert names == {"my_task.py", "my_rules.py", "final_answer.py"}
        functions = reward_functions([RewardConfig(name="my_reward:bonus")])
        assert {path.name for path in scoring_files(task, functions)} - names == {"my_reward.py"}
    finally:
        for module in ("my_task", "my_rules", "my_reward"):
            del sys.modules[module]


def test_another_version_of_the_scoring_library_changes_the_digest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("reasoning_gym")
    config = config_of(name="reasoning_gym:chain_sum")
    one = identify(config, run_id="r").things
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "999.0")
    other = identify(config, run_id="r").things
    assert one[SCORING].digest != other[SCORING].digest
    assert other[SCORING].parts["reasoning-gym"] == "999.0"
    assert one[DATA] == other[DATA]
