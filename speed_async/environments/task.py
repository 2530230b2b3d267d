"""The task interface: prompts and the scoring of completions."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from speed_async.types import Prompt


class Task(Protocol):
    """Prompts and their verifier. Created from the config, once per process.

    A method `warm_up()` is optional. Each verifier worker calls it at its start, to import what
    `score` needs; in the first call, that would count against its time limit.
    """

    @property
    def train_prompts(self) -> Sequence[Prompt]:
        """Prompt i has prompt_id i."""
        ...

    @property
    def held_out_prompts(self) -> Sequence[Prompt]:
        """Disjoint from the training prompts; prompt i has prompt_id i and held_out True."""
        ...

    def score(self, prompt: Prompt, completion: str) -> float:
        """Score in [0, 1]; 1.0 means correct. May raise or hang: the verifier pool handles it. It
        is the reward, unless the configuration names others (environments/rewards.py)."""
        ...

    def extract(self, completion: str) -> str | None:
        """The answer that `score` extracts from the completion, for display; None when there is
        none. May raise or hang."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ContentDigest:
    """Digests of all training and held-out prompts."""

    ordered: str
    """Of texts and answers in their order."""
    prompts: str
    """Of the texts, regardless of their order."""
    answers: str
    """Of the texts with their answers, regardless of their order."""


@runtime_checkable
class StoredTask(Protocol):
    """A task whose prompts stay on disk and are too many to read all of them at each start."""

    @property
    def content(self) -> ContentDigest: ...

    @property
    def notes(self) -> Sequence[str]:
        """Lines about its sources, for display."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """What is wrong with its sources, such as unusable rows."""
        ...


def fingerprint(task: Task) -> str:
    """Digest of all prompts. Must be equal in the processes that exchange prompt ids."""
    if isinstance(task, StoredTask):
        return task.content.ordered
    digest = hashlib.sha256()
    for prompts in (task.train_prompts, task.held_out_prompts):
        for prompt in prompts:
            digest.update(prompt_bytes(prompt))
        digest.update(b"\1")
    return digest.hexdigest()[:16]


def prompt_bytes(prompt: Prompt) -> bytes:
    """What a digest of prompts covers of each."""
    return f"{prompt.prompt_id}\0{prompt.text}\0{prompt.answer}\n".encode()
