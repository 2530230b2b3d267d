"""The `verifiers:<environment>` task: a single-turn environment of the `verifiers` library.

The environment runs in a process of its own, in an interpreter of the user's choice: the library
has many dependencies and an event loop. Processes that only need the prompts stop it when they have
them. A verifier worker has one as long as it lives; both are killed at the time limit.
"""

import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

from speed_async.environments.verifiers_library.process import EnvironmentProcess
from speed_async.errors import ConfigError, TaskError
from speed_async.types import Prompt

MIN_TRAIN_PROMPTS = 2


class VerifiersTask:
    """Starts no process before prompts or scores are needed."""

    def __init__(
        self,
        *,
        environment: str,
        options: Mapping[str, object],
        python: str | None,
        num_prompts: int,
        num_held_out: int,
        seed: int,
    ) -> None:
        """`options`: arguments of the environment. `python`: an interpreter; None: this one."""
        self._environment = environment
        self._options = dict(options)
        self._python = python or sys.executable
        self._num_prompts = num_prompts
        self._num_held_out = num_held_out
        self._seed = seed
        self._scorer: EnvironmentProcess | None = None

    @property
    def train_prompts(self) -> Sequence[Prompt]:
        return self._read[0]

    @property
    def held_out_prompts(self) -> Sequence[Prompt]:
        return self._read[1]

    @property
    def source_files(self) -> Sequence[Path]:
        """The source of the environment."""
        return self._read[2]

    def warm_up(self) -> None:
        """Start the process that scores. Raises ConfigError or TaskError."""
        if self._scorer is None or self._scorer.has_ended:
            self._scorer = self._start()

    def score(self, prompt: Prompt, completion: str) -> float:
        """The rubric's weighted sum, divided by the sum of its positive weights: 1.0 if every
        reward is. Raises TaskError when a reward function raises, or the process ends."""
        return float(self._call({"row": prompt.metadata, "completion": completion})["score"])

    def extract(self, completion: str) -> str | None:
        """What the environment's parser finds."""
        return self._call({"completion": completion})["extracted"]

    def _call(self, request: Mapping[str, object]) -> dict[str, Any]:
        self.warm_up()
        assert self._scorer is not None
        return self._scorer.call(request)

    def _start(self) -> EnvironmentProcess:
        return EnvironmentProcess(self._python, self._environment, self._options)

    @cached_property
    def _read(self) -> tuple[Sequence[Prompt], Sequence[Prompt], Sequence[Path]]:
        """Training prompts, held-out prompts, and source files."""
        with closing(self._start()) as process:
            most = self._num_prompts + self._num_held_out
            train = process.call({"split": "train", "most": most})["rows"]
            held_out = process.call({"split": "eval", "most": self._num_held_out})["rows"]
            files = process.files
        if not held_out:
            if len(train) < self._num_held_out + MIN_TRAIN_PROMPTS:
                raise ConfigError(
                    "task.num_held_out",
                    self._num_held_out,
                    f"the environment '{self._environment}' has {len(train)} prompts; set it to "
                    f"{max(0, len(train) - MIN_TRAIN_PROMPTS)} or less",
                )
            indices = range(len(train))
            chosen = set(random.Random(self._seed).sample(indices, self._num_held_out))
            held_out = [train[index] for index in indices if index in chosen]
        reserved = {_text(row) for row in held_out}
        train = [row for row in train if _text(row) not in reserved][: self._num_prompts]
        if len(train) < MIN_TRAIN_PROMPTS:
            raise TaskError(
                f"the environment '{self._environment}' has {len(train)} prompts that are not held "
                f"out: at least {MIN_TRAIN_PROMPTS} are required"
            )
        return _prompts(train, held_out=False), _prompts(held_out, held_out=True), files


def _prompts(rows: Sequence[dict[str, Any]], *, held_out: bool) -> list[Prompt]:
    return [
        Prompt(
            prompt_id=index,
            text=_text(row),
            answer=str(row.get("answer", "")),
            held_out=held_out,
            metadata=row,
        )
        for index, row in enumerate(rows)
    ]


def _text(row: Mapping[str, Any]) -> str:
    """The text of a prompt. That of the system stands above that of the user, because a prompt is
    one message of the user (`model.chat_template`). Raises TaskError for other messages."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    roles = [message["role"] for message in prompt]
    texts = [message["content"] for message in prompt]
    if roles not in (["user"], ["system", "user"]) or not all(isinstance(t, str) for t in texts):
        raise TaskError(
            f"a prompt of the environment has messages of {', '.join(roles)}: only a text of the "
            "user, after one of the system or alone, can be used"
        )
    return "\n\n".join(texts)
