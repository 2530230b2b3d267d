"""The check of prompt lengths: which prompts of many it reads."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from speed_async.config.load import build_config
from speed_async.launcher.preflight import prompts
from speed_async.launcher.preflight.findings import Findings
from speed_async.launcher.preflight.model import check_model
from speed_async.launcher.preflight.tokenizer import check_tokenizer
from speed_async.types import Prompt
from tests.fakes.paths import MODEL


class Recorded(Sequence[Prompt]):
    """Prompts that record which of them are read."""

    def __init__(self, num_prompts: int) -> None:
        self._num_prompts = num_prompts
        self.read: set[int] = set()

    def __len__(self) -> int:
        return self._num_prompts

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(self._num_prompts))]
        self.read.add(index)
        return Prompt(prompt_id=index, text="1+1=", answer="2")


def test_of_many_prompts_neighbours_are_read_so_that_few_pages_of_a_file_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompts, "MAX_CHARACTERS", 40_000)
    config = build_config({"model": {"path": str(MODEL)}, "task": {"name": "arithmetic"}})
    findings = Findings()
    model = check_model(config, MODEL, findings)
    tokenizer = check_tokenizer(config, MODEL, findings)
    assert model is not None and tokenizer is not None
    many, few = Recorded(100_000), Recorded(9_000)
    parts = [("training", many), ("held-out", few)]
    measured = prompts.check_prompts(config, model, tokenizer, parts, findings)
    assert prompts.describe(measured[0]).endswith("in a sample of 10,048")  # 64 blocks of 157
    assert len({index // 100 for index in many.read}) <= 64 * 3
    assert min(many.read) == 0 and max(many.read) == 98_437 + 156
    assert measured[1].num_seen == 9_000 and len(few.read) == 9_000


def check_rows(folder: Path, texts: list[str], **task: object) -> Findings:
    config = build_config(
        {
            "model": {"path": str(folder)},
            "task": {"name": "arithmetic", **task},
            "actors": {"max_new_tokens": 8},
        }
    )
    findings = Findings()
    model = check_model(config, folder, findings)
    tokenizer = check_tokenizer(config, folder, findings)
    assert model is not None and tokenizer is not None
    rows = [Prompt(prompt_id=i, text=text, answer="") for i, text in enumerate(texts)]
    prompts.check_prompts(
        config, model, tokenizer, [("training", rows), ("held-out", rows)], findings
    )
    return findings


def test_training_prompts_over_the_limit_are_counted_and_left_out() -> None:
    texts = ["1+1=", "12+1=", "123+1="]  # and one BOS
    findings = check_rows(MODEL, texts, max_prompt_tokens=5)
    assert findings.errors == []
    assert findings.warnings == [
        "2 of 3 training prompts cannot be trained on (over task.max_prompt_tokens); the first is "
        "prompt 1, '12+1=': 6 tokens"
    ]


def test_long_prompts_are_errors_if_configured() -> None:
    texts = ["1+1=", "1" * 12, "1" * 200]
    findings = check_rows(MODEL, texts, max_prompt_tokens=5, long_prompts="error")
    context, limit = map(str, findings.errors)
    assert "'task.long_prompts' = 'error': 1 of 3 training prompts are too long" in context
    assert "prompt 2, " in context and "prompt 1, '111111111111': 13 tokens" in limit
    assert "set 'leave_out'" in limit


CHAT = {"chat_template": True}
TURNS = "{% for m in messages %}{{ m.content }}<pad>\n{% endfor %}"
"""Ends a turn with a special token that is not EOS."""


def check_chat(folder: Path, **model: object) -> Findings:
    (folder / "chat_template.jinja").write_text(TURNS)
    config = build_config(
        {"model": {"path": str(folder), **CHAT, **model}, "task": {"name": "arithmetic"}}
    )
    findings = Findings()
    check_tokenizer(config, folder, findings)
    return findings


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_a_template_that_ends_turns_with_another_token_than_eos_is_reported(model: Path) -> None:
    [warning] = check_chat(model).warnings
    assert "ends a turn with '<pad>', but completions end at '<eos>' only" in warning
    assert 'Set model.stop_tokens = ["<pad>"]' in warning
    settled = check_chat(model, stop_tokens=["<pad>"])
    assert settled.warnings == [] and settled.errors == []
    assert settled.sections == [("completions end at", ["'<pad>', '<eos>'"])]


def test_a_template_whose_end_of_turn_is_in_the_generation_config_is_not_reported(
    model: Path,
) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert check_chat(model).warnings == []


@pytest.mark.parametrize("text", ["12", "unknown", ""])
def test_a_stop_token_that_is_not_one_token_is_an_error(model: Path, text: str) -> None:
    [error] = check_chat(model, stop_tokens=[text]).errors
    assert f"'model.stop_tokens' = {text!r}: is not one token of this model" in str(error)
