"""A task whose verifier fails on request."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from speed_async.types import Prompt

HANGS_S = 3600.0
"""Asleep: a hung call must not take the CPU time of other tests. "hang in C" takes it."""


class LibraryTimeout(BaseException):
    """Like the timeouts of some libraries; requires two arguments, so it cannot be unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


@dataclass(frozen=True)
class FaultyTask:
    """Fails as specified by the prompt's text; otherwise compares completion and answer."""

    train_prompts: Sequence[Prompt] = ()
    held_out_prompts: Sequence[Prompt] = ()

    def score(self, prompt: Prompt, completion: str) -> float:
        fault = prompt.text
        if fault == "hang":
            time.sleep(HANGS_S)
        if fault == "hang in C":
            pow(10, 10**9)
        if fault == "raise":
            raise ValueError("cannot parse this")
        if fault == "raise timeout":
            raise LibraryTimeout("too", "slow")
        if fault == "exit":
            os._exit(3)
        if fault == "system exit":
            sys.exit(2)
        if fault == "two":
            return 2.0
        if fault == "nan":
            return float("nan")
        if fault == "none":
            return None  # pyright: ignore[reportReturnType]
        if fault == "pid":
            Path(prompt.answer).write_text(str(os.getpid()))
            return 1.0
        if fault == "pid and hang":
            Path(prompt.answer).write_text(str(os.getpid()))
            time.sleep(HANGS_S)
        return float(completion == prompt.answer)

    def extract(self, completion: str) -> str | None:
        """Fails as specified by the completion; otherwise returns its last word."""
        if completion == "raise in extract":
            raise ValueError("cannot extract from this")
        if completion == "hang in extract":
            time.sleep(HANGS_S)
        if completion == "exit in extract":
            os._exit(4)
        if completion == "extract a number":
            return 7  # pyright: ignore[reportReturnType]
        return completion.split()[-1] if completion else None


def make_faulty() -> FaultyTask:
    return FaultyTask()


def prompt(text: str, answer: str = "7", prompt_id: int = 0) -> Prompt:
    return Prompt(prompt_id=prompt_id, text=text, answer=answer)
