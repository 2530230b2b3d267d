import pytest

from speed_async.environments.dataset.columns import (
    Columns,
    RowError,
    prompt_text,
    read_row,
    recognise_columns,
)
from speed_async.errors import DataError
from tests.fakes.published_files import AFTER, BEFORE


def recognised(record: dict[str, object]) -> tuple[str, str]:
    columns = recognise_columns(record, where="file")
    return columns.prompt, columns.answer


def test_published_schemas_are_recognised() -> None:
    assert recognised({"question": "", "answer": ""}) == ("question", "answer")
    assert recognised({"problem": "", "solution": "", "level": ""}) == ("problem", "solution")
    assert recognised({"problem": "", "solution": "", "answer": ""}) == ("problem", "answer")
    assert recognised({"prompt": [], "reward_model": {"ground_truth": ""}}) == (
        "prompt",
        "reward_model.ground_truth",
    )


def test_columns_can_be_named() -> None:
    record = {"frage": "", "antwort": {"wert": ""}, "answer": ""}
    columns = recognise_columns(record, {"prompt": "frage", "answer": "antwort.wert"}, where="file")
    assert (columns.prompt, columns.answer) == ("frage", "antwort.wert")
    assert columns.top_level == ("frage", "antwort")


def test_an_unknown_schema_is_refused_with_its_columns() -> None:
    with pytest.raises(DataError, match="file: no column for the prompt among 'frage', 'answer'"):
        recognise_columns({"frage": "", "answer": ""}, where="file")


def test_a_named_column_that_is_absent_is_refused() -> None:
    with pytest.raises(DataError, match=r"columns.answer = 'reply' is not among"):
        recognise_columns({"prompt": "", "answer": ""}, {"answer": "reply"}, where="file")


def test_a_row_of_dapo_is_read_without_its_instruction() -> None:
    record: dict[str, object] = {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": BEFORE + "What is $2+2$?" + AFTER}],
        "reward_model": {"ground_truth": "4"},
        "extra_info": {"index": "u-1"},
    }
    row = read_row(record, recognise_columns(record, where="file"))
    assert (row.prompt, row.answer, row.source, row.id) == (
        "What is $2+2$?",
        "4",
        "math_dapo",
        "u-1",
    )
    assert row.had_instruction


def test_levels_are_short_texts() -> None:
    columns = Columns(prompt="p", answer="a", level="l")
    levels = [read_row({"p": "x", "a": 1, "l": level}, columns).level for level in (5.0, "Level 5")]
    assert levels == ["5", "5"]


def test_messages_of_the_system_are_no_part_of_the_prompt() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    assert prompt_text(chat) == "2+2?"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (None, "missing"),
        ("  ", "empty"),
        (BEFORE + AFTER, "empty"),
        (7, "int"),
        (["2+2?"], "list"),
        ([{"role": "assistant", "content": "4"}], "assistant"),
        ([{"role": "user", "content": "a"}] * 2, "2 messages"),
        ([{"role": "user", "content": ["parts"]}], "list"),
    ],
)
def test_a_row_without_a_usable_prompt_is_refused(prompt: object, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read_row({"prompt": prompt, "answer": 1}, Columns(prompt="prompt", answer="answer"))
