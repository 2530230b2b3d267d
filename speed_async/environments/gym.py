"""The `reasoning_gym:<name>` task: prompts and scorers of the reasoning-gym library.

A completion is correct when the library's score is 1.0. Many of its data sets share a base scorer
that gives partial credit for substrings (31 instead of 3 scores 0.5), which a policy would learn
to exploit, so any score below 1.0 becomes 0.
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
"""Data sets (of 0.1.25) that iterate over sets of strings to generate a question."""

Entry = dict[str, object]


class GymDataSet(Protocol):
    """The part of the library's ProceduralDataset that this module uses."""

    def __getitem__(self, idx: int) -> Entry: ...

    def score_answer(self, answer: str | None, entry: Entry) -> float: ...


class ReasoningGymTask:
    """Generates prompts lazily, so that a process that only scores does not generate them.

    Accessing the prompts raises ConfigError when the data set has too few distinct questions. The
    held-out prompts depend only on the seed and their number.
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
        data set whose questions differ between processes)."""
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

        The scored text is the last `<answer>...</answer>`, else the last `\boxed{}`, else the
        whole completion, stripped. Text on which the library's scorer raises scores 0.0.
        """
        entry: Entry = {"question": prompt.text, **prompt.metadata}
        try:
            return self._passes(_extract(completion), entry)
        except Exception:  # some scorers raise on malformed text, which a policy may generate
            oracle = entry["answer"]
            if isinstance(oracle, str) and not self._passes(oracle, entry):
                raise  # the scorer rejects its own answer, so the completion is not the cause
            return 0.0

    def extract(self, completion: str) -> str | None:
        return _extract(completion)

    @cached_property
    def _held_out(self) -> Sequence[Prompt]:
        return self._generate("held_out", self._num_held_out, exclude=frozenset())

    @cached_property
    def _train(self) -> Sequence[Prompt]:
        held_out = frozenset(_key(prompt.text) for prompt in self._held_out)
        return self._generate("train", self._num_prompts, exclude=held_out)

    def _passes(self, answer: str, entry: Entry) -> float:
        return float(self._scorer.score_answer(answer, entry) >= 1.0)

    def _generate(self, part: str, num_prompts: int, exclude: frozenset[str]) -> Sequence[Prompt]:
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
                    f"'{option}' is not supported here: use task.seed and task.num_prompts",
                )
        seed = _derived_seed(self._seed, part)
        try:
            return self._library.create_dataset(self._name, seed=seed, size=size, **self._options)
        except Exception as error:  # the library rejects options with various errors, also asserts
            raise ConfigError(
                "task.options",
                self._options,
                f"reasoning-gym's '{self._name}' rejects them ({error})",
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
                f"reasoning-gym's '{self._name}' generates different questions in every process: "
                "set the environment variable PYTHONHASHSEED=0 for the whole run"
            )

    def _too_few(self, part: str, requested: int, generated: int, num_tries: int) -> ConfigError:
        field = "task.num_held_out" if part == "held_out" else "task.num_prompts"
        return ConfigError(
            field,
            requested,
            f"reasoning-gym's '{self._name}' generated only {generated} distinct questions in "
            f"{num_tries} tries: request fewer, or extend the data set with task.options",
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
    """Seed the global generator, which some data sets (list_functions) use, then restore it."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def _derived_seed(seed: int, part: str) -> int:
    """A separate seed per part, because the library generates item i from seed + i."""
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
