"""The task interface: prompts and the scoring of completions."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from speed_async.types import Prompt


class Task(Protocol):
    """Prompts and their verifier. Created from the config, once per process."""

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


def fingerprint(task: Task) -> str:
    """Digest of all prompts. Must be equal in the processes that exchange prompt ids."""
    digest = hashlib.sha256()
    for prompts in (task.train_prompts, task.held_out_prompts):
        for prompt in prompts:
            digest.update(f"{prompt.prompt_id}\0{prompt.text}\0{prompt.answer}\n".encode())
        digest.update(b"\1")
    return digest.hexdigest()[:16]
