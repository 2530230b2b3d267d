"""The task interface: prompts and the scoring of completions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import xxhash

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
    """Digests of all training and held-out prompts, regardless of their order."""

    prompts: str
    """Of the texts."""
    answers: str
    """Of the texts with their answers."""


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


@runtime_checkable
class StoredPrompts(Protocol):
    """Prompts on disk, whose digest is known without reading them."""

    @property
    def digest(self) -> str | None:
        """None if it is not known."""
        ...


class PromptsDigest:
    """Digest of the texts and answers of prompts in their order."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()

    def add(self, text: str, answer: str) -> None:
        for part in (text, answer):
            content = part.encode(errors="surrogatepass")
            self._digest.update(len(content).to_bytes(8, "little") + content)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Digest of prompts in their order, with their answers."""
    if isinstance(prompts, StoredPrompts) and prompts.digest is not None:
        return prompts.digest
    digest = PromptsDigest()
    for prompt in prompts:
        digest.add(prompt.text, prompt.answer)
    return digest.hexdigest()


def data_fingerprint(task: Task, suites: Mapping[str, Sequence[Prompt]]) -> str:
    """Digest of all prompts of a run. Must be equal in processes that exchange prompt ids."""
    digest = xxhash.xxh3_128()
    parts = {"train": task.train_prompts, "held_out": task.held_out_prompts}
    for name, prompts in [*parts.items(), *suites.items()]:
        digest.update(f"{name}\0{len(prompts)}\0{prompts_digest(prompts)}\n".encode())
    return digest.hexdigest()[:16]
