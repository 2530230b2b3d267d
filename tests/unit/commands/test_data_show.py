"""`speed-async data show`: prompts as the engine gets them."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from speed_async.commands.data import data
from tests.fakes.paths import MODEL, REPOSITORY


def test_prompts_are_shown_with_special_tokens_answers_and_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"problem": f"{i}0+20=", "answer": str(i)} for i in range(1, 5)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.toml").write_text(
        f'[model]\npath = "{MODEL}"\n[task]\nname = "dataset"\npath = "data.jsonl"\n'
        'format = "<eos>{prompt}"\nnum_held_out = 1\nmatch = "math"\n'
    )
    arguments = ["show", str(tmp_path / "c.toml"), "--num", "2", "--task.seed", "3"]
    result = CliRunner().invoke(data, arguments, catch_exceptions=False)
    assert "4 of 4 rows are usable" in result.output
    assert "3 training prompts, 1 held out" in result.output
    assert result.output.count("--- training prompt") == 2
    shown = result.output.partition("--- training prompt 0: ")[2].splitlines()[:7]
    answer = shown[2].removeprefix("answer: ").strip("'")
    assert shown == [
        "8 tokens ---",
        f"<bos><eos>{answer}0+20=",
        f"answer: '{answer}'",
        f"  right, alone: reward 1, extracted '{answer}'",
        f"  right, in a box: reward 1, extracted '{answer}'",
        f"  right, in a sentence: reward 1, extracted '{answer}'",
        f"  wrong: reward 0, extracted '{answer}7'",
    ]


def test_a_bare_right_answer_passes_where_the_task_wants_no_box() -> None:
    arguments = ["show", str(REPOSITORY / "quickstart/config.toml"), "--num", "1"]
    result = CliRunner().invoke(data, arguments, catch_exceptions=False)
    alone, in_box, _, wrong = result.output.splitlines()[-4:]
    assert alone.startswith("  right, alone: reward 1, extracted")
    assert in_box.startswith("  right, in a box: reward 0") and "wrong: reward 0" in wrong


def test_the_system_prompt_template_arguments_and_length_limit_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}<pad>{% endfor %}{{ number }}"
    )
    (tmp_path / "c.toml").write_text(
        f'[model]\npath = "{model}"\nchat_template = true\nsystem_prompt = "12"\n'
        'template_arguments = { number = 7 }\n[task]\nname = "arithmetic"\n'
        "max_prompt_tokens = 4\n"
    )
    arguments = ["show", str(tmp_path / "c.toml"), "--num", "1"]
    result = CliRunner().invoke(data, arguments, catch_exceptions=False)
    shown = result.output.partition("--- training prompt 0: ")[2].splitlines()[:2]
    assert shown[0].endswith(" tokens, left out: task.max_prompt_tokens ---")
    assert shown[1].startswith("12<pad>") and shown[1].endswith("=<pad>7")


def test_weighted_rewards_are_shown_with_their_parts_and_a_hanging_one_is_timed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": f"{i}0+20=", "answer": str(i)} for i in range(1, 5)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "slow_wrong.py").write_text(
        "import time\n"
        "def reward(*, prompt, completion, answer, metadata):\n"
        "    time.sleep(60 if 'boxed' not in completion else 0)\n"
        "    return 0.5\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[3]}")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "c.toml").write_text(
        f'[model]\npath = "{MODEL}"\n[task]\nname = "dataset"\npath = "data.jsonl"\n'
        'num_held_out = 1\nmatch = "math"\n[actors]\nverifier_timeout_s = 2.0\n'
        '[[task.rewards]]\nname = "correct"\n'
        '[[task.rewards]]\nname = "slow_wrong:reward"\nweight = 0.5\n'
    )
    arguments = ["show", str(tmp_path / "c.toml"), "--num", "1"]
    result = CliRunner().invoke(data, arguments, catch_exceptions=False)
    right, unboxed, wrong = result.output.splitlines()[-3:]
    assert "reward 1.25 (correct 1, reward 0.5; passes)" in right
    assert "timeout, the verifier did not return within 2 s" in unboxed
    assert "reward 0.25 (correct 0, reward 0.5; does not pass)" in wrong
