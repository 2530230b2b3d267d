"""The task seam: prompts, and how a completion to one is scored."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from speed_async.types import Prompt


class Task(Protocol):
    """Prompts and their verifier. Made once in every process that needs it, from the config."""

    @property
    def train_prompts(self) -> Sequence[Prompt]:
        """Prompt i has prompt_id i."""
        ...

    @property
    def held_out_prompts(self) -> Sequence[Prompt]:
        """Disjoint from the training prompts; prompt i has prompt_id i and held_out True."""
        ...

    def score(self, prompt: Prompt, completion: str) -> float:
        """Reward in [0, 1]; 1.0 means correct. May raise, may hang: the verifier pool copes."""
        ...

    def extract(self, completion: str) -> str | None:
        """What `score` takes for the completion's answer, for people to look at; None when it finds
        none. May raise, may hang."""
        ...


def fingerprint(task: Task) -> str:
    """Digest of all prompts: two processes that lease and serve prompt ids must agree on it."""
    digest = hashlib.sha256()
    for prompts in (task.train_prompts, task.held_out_prompts):
        for prompt in prompts:
            digest.update(f"{prompt.prompt_id}\0{prompt.text}\0{prompt.answer}\n".encode())
        digest.update(b"\1")
    return digest.hexdigest()[:16]
