from speed_async.environments.dataset.columns import DatasetRow
from speed_async.environments.dataset.preparation.near_duplicates import near_duplicates

WORDS = "a farmer has some apples and gives one of them to each child of his village on monday"


def row(prompt: str, answer: str) -> DatasetRow:
    return DatasetRow(
        prompt=prompt, answer=answer, level="", source="", id="", had_instruction=False
    )


def test_only_problems_of_similar_text_are_near_duplicates() -> None:
    rows = [
        row(WORDS, "1"),
        row(WORDS.replace("apples", "pears"), "1"),  # 14 of 18 shingles: a similarity of 0.67
        row(WORDS.upper() + " $", "1"),
        row(WORDS + " morning", "1"),  # 16 of 17 shingles
    ]
    pairs = list(near_duplicates(rows))
    assert [(pair.index, pair.first, round(pair.similarity, 2)) for pair in pairs] == [
        (2, 0, 1.0),
        (3, 0, 0.94),
    ]


def test_the_earlier_row_with_the_same_answer_is_named_first() -> None:
    rows = [row(WORDS, "1"), row(WORDS + " morning", "2"), row(WORDS, "2")]
    pairs = list(near_duplicates(rows))
    assert [(pair.index, pair.first, pair.same_answer) for pair in pairs] == [
        (1, 0, False),
        (2, 1, True),
    ]


def test_no_pair_below_the_threshold_is_reported() -> None:
    words = [f"w{index}" for index in range(23)]
    text = " ".join(words)
    changed = [text.replace(f"{word} ", f"x{word} ") for word in words[2:20]]
    # each shares 18 of 24 shingles with the first: 0.75, which many hashes take for similar
    assert not list(near_duplicates([row(text, "1"), *(row(each, "1") for each in changed)]))
