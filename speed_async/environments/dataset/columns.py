"""Recognises the columns of a data set by its schema, and reads prompt and answer of one row.

| published shape | prompt | answer |
| --- | --- | --- |
| prepared by `speed-async data prepare` | `prompt` | `answer` |
| GSM8K | `question` | `answer`, after its last `####` |
| MATH, NuminaMath | `problem` | last box of `solution` |
| MATH-500, DeepScaleR, AIME, AMC | `problem` or `question` | `answer` |
| DAPO and other files for verl | `prompt`: messages of a chat | `reward_model.ground_truth` |
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from speed_async.environments.dataset.answers import (
    AnswerError,
    answer_text,
    is_encodable,
    solution_answer,
)
from speed_async.environments.dataset.instructions import without_instruction
from speed_async.errors import DataError

PROMPTS = ("problem", "question", "prompt")
SOLUTION = "solution"
ANSWERS = (
    "answer",
    "reward_model.ground_truth",
    "ground_truth",
    "expected_answer",
    "final_answer",
    SOLUTION,
)
LEVELS = ("level", "difficulty")
SOURCES = ("source", "data_source")
IDS = ("id", "unique_id", "extra_info.index")
"""Names of columns, the first that a data set has is used. A dot separates nested names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Where prompt and answer of a data set are; "" when it has no such column.

    A nested column is written with dots: `reward_model.ground_truth`.
    """

    prompt: str
    answer: str
    level: str = ""
    source: str = ""
    id: str = ""

    @property
    def top_level(self) -> tuple[str, ...]:
        """The distinct columns of the file that are read."""
        names = (self.prompt, self.answer, self.level, self.source, self.id)
        return tuple(dict.fromkeys(name.partition(".")[0] for name in names if name))


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRow:
    """One usable row: the prompt without the file's own instruction, the normalised answer."""

    prompt: str
    answer: str
    level: str
    source: str
    id: str
    had_instruction: bool
    """Whether an instruction around the problem was taken off."""


class RowError(Exception):
    """Why a row cannot be used."""


def recognise_columns(
    record: Mapping[str, object], chosen: Mapping[str, str] | None = None, *, where: str
) -> Columns:
    """The columns of a data set, given one of its rows (nested columns as mappings).

    `chosen` names columns explicitly, by the fields of Columns. `where` names the data set in
    errors. Raises DataError when a column cannot be found.
    """
    chosen = chosen or {}
    found = {
        "prompt": chosen.get("prompt") or _first(record, PROMPTS),
        "answer": chosen.get("answer") or _first(record, ANSWERS),
        "level": chosen.get("level") or _first(record, LEVELS),
        "source": chosen.get("source") or _first(record, SOURCES),
        "id": chosen.get("id") or _first(record, IDS),
    }
    for field, tried in (("prompt", PROMPTS), ("answer", ANSWERS)):
        if not found[field]:
            raise DataError(
                f"{where}: no column for the {field} among {_names(record)}: name it, as in "
                f"columns = {{{field} = ...}}, or rename one to {' or '.join(tried)}"
            )
    for field, name in chosen.items():
        if name and not has_column(record, name):
            raise DataError(
                f"{where}: columns.{field} = {name!r} is not among its columns {_names(record)}: "
                "correct it (a dot separates the names of a nested column)"
            )
    return Columns(**found)


def read_row(record: Mapping[str, object], columns: Columns) -> DatasetRow:
    """Prompt and normalised answer of one row. Raises RowError."""
    prompt = prompt_text(value_at(record, columns.prompt))
    problem, had_instruction = without_instruction(prompt)
    if not problem:
        raise RowError("the prompt is empty")
    value = value_at(record, columns.answer)
    of_solution = columns.answer.rpartition(".")[2] == SOLUTION
    try:
        answer = solution_answer(value) if of_solution else answer_text(value)
    except AnswerError as error:
        raise RowError(str(error)) from None
    return DatasetRow(
        prompt=problem,
        answer=answer,
        level=level_text(value_at(record, columns.level)),
        source=_label(value_at(record, columns.source)),
        id=_label(value_at(record, columns.id)),
        had_instruction=had_instruction,
    )


def prompt_text(value: object) -> str:
    """The text of a prompt: a text, or the user's message of a chat `[{role, content}]`.

    Messages of the system are left out. Raises RowError.
    """
    if isinstance(value, list | tuple):
        value = _user_message(value)
    if value is None:
        raise RowError("the prompt is missing")
    if not isinstance(value, str):
        raise RowError(f"the prompt is a {type(value).__name__}, not a text or a chat")
    if not is_encodable(value):
        raise RowError("the prompt contains a lone surrogate")
    return value.strip()


def level_text(value: object) -> str:
    """A level as a short text: 5, 5.0 and "Level 5" are "5"."""
    return _label(value).removeprefix("Level ").strip()


def value_at(record: Mapping[str, object], name: str) -> object:
    """The value of a column, nested names separated by dots; None when it is absent."""
    if name in record:
        return record[name]
    value: object = record
    for part in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def has_column(record: Mapping[str, object], name: str) -> bool:
    """Whether a row has this column, nested names separated by dots."""
    if name in record:
        return True
    head, _, rest = name.partition(".")
    nested = record.get(head)
    return bool(rest) and isinstance(nested, Mapping) and has_column(nested, rest)


def _first(record: Mapping[str, object], names: Iterable[str]) -> str:
    return next((name for name in names if has_column(record, name)), "")


def _user_message(messages: list[object] | tuple[object, ...]) -> object:
    users: list[object] = []
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise RowError("the prompt is a list, but not of messages with role and content")
        if message["role"] == "user":
            users.append(message["content"])
        elif message["role"] != "system":
            raise RowError(f"the chat of the prompt has a message of role {message['role']!r}")
    if len(users) != 1:
        raise RowError(f"the chat of the prompt has {len(users)} messages of the user instead of 1")
    return users[0]


def _label(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int | float) and not isinstance(value, bool) and value == value:
        return str(value).strip()
    return ""


def _names(record: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in list(record)[:12]) or "none"
