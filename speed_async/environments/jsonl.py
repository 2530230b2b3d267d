"""The `jsonl` task: prompts and answers from a file, matched as text, numbers or mathematics."""

import random
from pathlib import Path

from speed_async.environments.jsonl_file import DataRow, read_rows
from speed_async.environments.matching import MatchedTask, MatchKind
from speed_async.errors import ConfigError, DataError
from speed_async.types import Prompt

MIN_TRAIN_PROMPTS = 2


class JsonlTask(MatchedTask):
    r"""One object per line: `prompt` (string), `answer` (string or number), other keys as metadata.

    Match "exact" compares texts (rules: exact_answer.py), "numeric" compares numbers
    (numeric_answer.py), "math" compares mathematical values (mathematics/). All extract the final
    answer of answer and completion from the last `\boxed{}`, else from after the last `####`. The
    held-out prompts are sampled with the seed.
    """

    def __init__(self, *, path: str, match: MatchKind, num_held_out: int, seed: int) -> None:
        """Raises DataError (unusable file) or ConfigError (too many held-out prompts)."""
        super().__init__(match)
        rows = read_rows(Path(path), self._matching.answer_error)
        _check_size(path, len(rows), num_held_out)
        selected = set(random.Random(seed).sample(range(len(rows)), num_held_out))
        train = [row for index, row in enumerate(rows) if index not in selected]
        held_out = [row for index, row in enumerate(rows) if index in selected]
        self.train_prompts = [_prompt(index, row, False) for index, row in enumerate(train)]
        self.held_out_prompts = [_prompt(index, row, True) for index, row in enumerate(held_out)]


def _check_size(path: str, num_rows: int, num_held_out: int) -> None:
    if num_rows <= MIN_TRAIN_PROMPTS:
        raise DataError(
            f"data file '{path}' has {num_rows} distinct prompts: at least "
            f"{MIN_TRAIN_PROMPTS + 1} are required ({MIN_TRAIN_PROMPTS} to train on and 1 held out)"
        )
    most = num_rows - MIN_TRAIN_PROMPTS
    if num_held_out > most:
        raise ConfigError(
            "task.num_held_out",
            num_held_out,
            f"'{path}' has {num_rows} distinct prompts; set it to {most} or less, "
            "or add prompts to the file",
        )


def _prompt(index: int, row: DataRow, held_out: bool) -> Prompt:
    level = row.extra.get("level", "")
    return Prompt(
        prompt_id=index,
        text=row.prompt,
        answer=row.answer,
        level=str(level) if isinstance(level, str | int | float) else "",
        held_out=held_out,
        metadata=row.extra,
    )
