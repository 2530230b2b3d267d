"""The check of prompt lengths: which prompts of many it reads."""

from collections.abc import Sequence
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
