"""The `reasoning_gym:<name>` task: prompts and scorers of the reasoning-gym library.

Correct means a library score of 1.0. Many of its data sets share a base scorer that pays
partial credit for substrings (answer 31 where 3 is right earns 0.5), which a policy would learn
to collect; so anything less than 1.0 is 0.
"""

import difflib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import ModuleType
from typing import Protocol

from speed_async.environments.final_answer import last_boxed, last_tagged
from speed_async.errors import ConfigError, TaskError
from speed_async.types import Prompt

MAX_TRIES_PER_PROMPT = 20
_RESERVED_OPTIONS = ("seed", "size")
_HASH_ORDERED = frozenset(
    ("isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder")
)
"""Data sets (of 0.1.25) that iterate over sets of strings while they make a question."""

Entry = dict[str, object]


class GymDataSet(Protocol):
    """What is used of the library's ProceduralDataset."""

    def __getitem__(self, idx: int) -> Entry: ...

    def score_answer(self, answer: str | None, entry: Entry) -> float: ...


class ReasoningGymTask:
    """Prompts are made when first asked for, so a process that only scores does not make them.

    Asking for them raises ConfigError when the data set has too few distinct questions. The
    held-out prompts depend on the seed and their own number only.
    """

    def __init__(
        self,
        *,
        data_set: str,
        options: Mapping[str, object],
        num_prompts: int,
        num_held_out: int,
        seed: int,
    ) -> None:
        """Raises ConfigError (unknown data set or option) or TaskError (library missing, or a
        data set whose questions would differ from process to process)."""
        self._name = data_set
        self._options = dict(options)
        self._num_prompts = num_prompts
        self._num_held_out = num_held_out
        self._seed = seed
        self._library = _import_library()
        self._check_name()
        self._scorer = self._data_set("scorer", 1)

    @property
    def train_prompts(self) -> Sequence[Prompt]:
        return self._train

    @property
    def held_out_prompts(self) -> Sequence[Prompt]:
        return self._held_out

    def score(self, prompt: Prompt, completion: str) -> float:
        r"""1.0 when the library's score is 1.0 or more, else 0.0.

        Scored is the last `<answer>...</answer>`, else the last `\boxed{}`, else the whole
        completion, stripped. Text that the library's scorer cannot digest is wrong.
        """
        entry: Entry = {"question": prompt.text, **prompt.metadata}
        try:
            return self._passes(_extract(completion), entry)
        except Exception:  # some scorers raise on malformed text, which a policy writes freely
            oracle = entry["answer"]
            if isinstance(oracle, str) and not self._passes(oracle, entry):
                raise  # the scorer refuses even its own answer: not the completion's fault
            return 0.0

    def extract(self, completion: str) -> str | None:
        return _extract(completion)

    @cached_property
    def _held_out(self) -> Sequence[Prompt]:
        return self._make("held_out", self._num_held_out, exclude=frozenset())

    @cached_property
    def _train(self) -> Sequence[Prompt]:
        held_out = frozenset(_key(prompt.text) for prompt in self._held_out)
        return self._make("train", self._num_prompts, exclude=held_out)

    def _passes(self, answer: str, entry: Entry) -> float:
        return float(self._scorer.score_answer(answer, entry) >= 1.0)

    def _make(self, part: str, num_prompts: int, exclude: frozenset[str]) -> Sequence[Prompt]:
        num_tries = MAX_TRIES_PER_PROMPT * num_prompts
        entries = self._data_set(part, num_tries)
        seen = set(exclude)
        prompts: list[Prompt] = []
        with _seeded_global_random(_derived_seed(self._seed, part)):
            for index in range(num_tries):
                entry = dict(entries[index])
                question = str(entry.pop("question"))
                if _key(question) in seen:
                    continue
                seen.add(_key(question))
                prompts.append(_prompt(len(prompts), question, entry, held_out=part == "held_out"))
                if len(prompts) == num_prompts:
                    return prompts
        raise self._too_few(part, num_prompts, len(prompts), num_tries)

    def _data_set(self, part: str, size: int) -> GymDataSet:
        for option in _RESERVED_OPTIONS:
            if option in self._options:
                raise ConfigError(
                    "task.options",
                    self._options,
                    f"'{option}' is not an option: use task.seed and task.num_prompts",
                )
        seed = _derived_seed(self._seed, part)
        try:
            return self._library.create_dataset(self._name, seed=seed, size=size, **self._options)
        except Exception as error:  # the library refuses options in many ways, asserts among them
            raise ConfigError(
                "task.options",
                self._options,
                f"reasoning-gym's '{self._name}' refuses them ({error})",
            ) from error

    def _check_name(self) -> None:
        known = self._library.factory.DATASETS
        if self._name not in known:
            close = difflib.get_close_matches(self._name, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "see its list of data sets"
            raise ConfigError(
                "task.name",
                f"reasoning_gym:{self._name}",
                f"reasoning-gym has no data set '{self._name}': {hint}",
            )
        if self._name in _HASH_ORDERED and os.environ.get("PYTHONHASHSEED", "random") == "random":
            raise TaskError(
                f"reasoning-gym's '{self._name}' makes other questions in every process: "
                "set the environment variable PYTHONHASHSEED=0 for the whole run"
            )

    def _too_few(self, part: str, wanted: int, made: int, num_tries: int) -> ConfigError:
        field = "task.num_held_out" if part == "held_out" else "task.num_prompts"
        return ConfigError(
            field,
            wanted,
            f"reasoning-gym's '{self._name}' gave only {made} distinct questions in {num_tries} "
            "tries: ask for fewer, or widen the data set by task.options",
        )


def _import_library() -> ModuleType:
    try:
        import reasoning_gym
    except ImportError as error:
        raise TaskError(
            f"the reasoning_gym tasks need the reasoning-gym library ({error}): "
            "pip install 'speed_async[reasoning-gym]'"
        ) from error
    return reasoning_gym


@contextmanager
def _seeded_global_random(seed: int) -> Iterator[None]:
    """Some data sets (list_functions) draw from the global generator: seed it, then restore it."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def _derived_seed(seed: int, part: str) -> int:
    """Far apart for each part, because the library makes item i from seed + i."""
    return random.Random(f"{seed}/{part}").randrange(2**31)


def _key(question: str) -> str:
    return " ".join(question.split())


def _extract(completion: str) -> str:
    tagged = last_tagged(completion)
    text = completion if tagged is None else tagged
    boxed = last_boxed(text)
    return text.strip() if boxed is None else boxed


def _prompt(index: int, question: str, entry: Entry, *, held_out: bool) -> Prompt:
    """`entry` is the library's record without its question; its answer may be None."""
    answer = entry["answer"]
    return Prompt(
        prompt_id=index,
        text=question,
        answer="" if answer is None else str(answer),
        held_out=held_out,
        metadata=entry,
    )
