"""The data card of a prepared data set: card.json for programs, card.md for people."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from speed_async.environments.dataset.answers import is_integer
from speed_async.environments.dataset.preparation.contamination import (
    MAX_ROWS_OF_PASSAGE,
    PASSAGE_WORDS,
)
from speed_async.environments.dataset.preparation.inputs import Input
from speed_async.environments.dataset.preparation.near_duplicates import (
    NUM_PERMUTATIONS,
    SHINGLE_WORDS,
    THRESHOLD,
)
from speed_async.environments.dataset.preparation.selection import NumberedRow
from speed_async.environments.dataset.preparation.sources import (
    HELD_OUT_SEED,
    NUM_HELD_OUT,
    Source,
)
from speed_async.environments.dataset.preparation.steps import Contamination, NearDuplicates

NUM_SAMPLES = 5
Card = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A step of the preparation and the number of rows that are left after it."""

    name: str
    num_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """What was done, as the card reports it."""

    source: Source
    input: Input
    command: str
    fingerprint: str
    steps: Sequence[Step]
    rejects: Mapping[str, int]
    num_instructions_removed: int
    near_duplicates: NearDuplicates
    contamination: Sequence[Contamination]
    rows: Sequence[NumberedRow]
    output_sha256: str


def make_card(done: Preparation) -> Card:
    """The content of card.json, without times: equal work gives equal bytes."""
    source, given = done.source, done.input
    return {
        "name": source.name,
        "role": source.role,
        "licence": source.licence,
        "hub": {"id": source.hub, "config": source.config, "split": source.split},
        "input": {
            "description": given.description,
            "format": given.format,
            "bytes": given.size_bytes,
            "sha256": given.sha256,
            "columns": asdict(given.columns),
        },
        "output": {
            "file": source.file_name,
            "rows": len(done.rows),
            "sha256": done.output_sha256,
        },
        "steps": [asdict(step) for step in done.steps],
        "rejects": dict(done.rejects),
        "instructions_removed": done.num_instructions_removed,
        "held_out": _held_out(source),
        "near_duplicates": asdict(done.near_duplicates)
        | {
            "threshold": THRESHOLD,
            "shingle_words": SHINGLE_WORDS,
            "permutations": NUM_PERMUTATIONS,
        },
        "contamination": [asdict(each) for each in done.contamination],
        "integer_answers": sum(is_integer(each.row.answer) for each in done.rows),
        "samples": _samples(done.rows),
        "command": done.command,
        "fingerprint": done.fingerprint,
    }


def card_text(card: Card) -> str:
    """card.md. Samples are indented, so that their LaTeX and markup stay as they are."""
    source = card["hub"]
    config = f", configuration {source['config']}" if source["config"] else ""
    given, output = card["input"], card["output"]
    columns = ", ".join(f"{key} from `{name}`" for key, name in given["columns"].items() if name)
    parts = [
        f"# {card['name']}",
        f"{output['rows']:,} rows for {card['role']}, in `{output['file']}`.",
        f"Published as [{source['id']}](https://huggingface.co/datasets/{source['id']})"
        f"{config}, split {source['split']}. Licence: {card['licence']}.",
        "Prepared by\n\n" + _indented(card["command"]),
        "## Steps\n\n" + "\n".join(step_lines(card)),
        "## Rows left out\n\n" + _rejects_text(card["rejects"]),
        "## Duplicates and held-out problems\n\n" + _duplicates_text(card),
        "## Contamination\n\n" + _contamination_text(card),
        f"## Files\n\n- input: {given['description']} ({given['format']}, {given['bytes']:,} "
        f"bytes), SHA-256 `{given['sha256']}`; {columns}\n"
        f"- output: `{output['file']}`, SHA-256 `{output['sha256']}`\n"
        f"- {card['integer_answers']:,} answers are integers",
        f"## Samples\n\n{_samples_text(card['samples'])}",
    ]
    return "\n\n".join(parts) + "\n"


def step_lines(card: Card) -> list[str]:
    """A table of the steps and the rows that each removes and leaves."""
    return [
        "| step | removed | rows left |",
        "| --- | ---: | ---: |",
        *(
            f"| {step['name']} | {removed:,} | {step['num_rows']:,} |"
            for step, removed in with_removed(card["steps"])
        ),
    ]


def with_removed(steps: Sequence[Card]) -> list[tuple[Card, int]]:
    """Each step of a card and the number of rows that it removed."""
    before = [steps[0]["num_rows"], *(step["num_rows"] for step in steps[:-1])]
    return [(step, rows - step["num_rows"]) for step, rows in zip(steps, before, strict=True)]


def contamination_lines(card: Card) -> list[str]:
    """One line for each evaluation set that was compared."""
    return [f"- {each['evaluation_set']}: {_overlap_text(each)}" for each in card["contamination"]]


def _overlap_text(each: Card) -> str:
    if not any(each[kind] for kind in ("same_text", "half", "passage")):
        return "no overlap"
    return (
        f"{each['same_text']:,} rows with the text of one of its problems, {each['half']:,} with "
        f"at least half of one's passages, {each['passage']:,} with fewer; "
        f"{each['problems']:,} of its problems are in the first two; "
        + ("removed" if each["removed"] else "not removed")
    )


def _held_out(source: Source) -> Card | None:
    if source.part == "all":
        return None
    return {"part": source.part, "seed": HELD_OUT_SEED, "problems": NUM_HELD_OUT}


def _samples(rows: Sequence[NumberedRow]) -> list[dict[str, str]]:
    """Rows at equal distances, from the first."""
    distance = max(1, len(rows) // NUM_SAMPLES)
    return [
        {"prompt": each.row.prompt, "answer": each.row.answer, "level": each.row.level}
        for each in rows[::distance][:NUM_SAMPLES]
    ]


def _rejects_text(rejects: Mapping[str, int]) -> str:
    if not rejects:
        return "None."
    listed = "\n".join(f"- {count:,}: {reason}" for reason, count in rejects.items())
    return f"{listed}\n\nEach is in `rejects.jsonl` with the number of its row."


def _duplicates_text(card: Card) -> str:
    near = card["near_duplicates"]
    text = (
        f"Near duplicates have a Jaccard similarity of at least {near['threshold']} of their "
        f"{near['shingle_words']}-word shingles (MinHash, {near['permutations']} permutations). "
        f"{near['same_answer']:,} rows resemble an earlier row and have its answer: "
        f"{'dropped' if near['dropped'] else 'kept'}. {near['other_answer']:,} resemble one with "
        "another answer: kept."
    )
    held_out = card["held_out"]
    if held_out is not None:
        text += (
            f"\n\n{held_out['problems']:,} problems are held out for evaluation with seed "
            f"{held_out['seed']}; these rows are "
            f"{'the held-out part' if held_out['part'] == 'held out' else 'the rest'}."
        )
    return text


def _contamination_text(card: Card) -> str:
    if card["role"] == "evaluation":
        return "Reported in the cards of the training sets that are prepared beside this one."
    if not card["contamination"]:
        return "No prepared evaluation set was beside this one or given."
    return (
        f"Same text: equal words, numbers and operators. Passage: {PASSAGE_WORDS} words in a row, "
        f"in at most {MAX_ROWS_OF_PASSAGE} rows.\n\n" + "\n".join(contamination_lines(card))
    )


def _samples_text(samples: Sequence[Mapping[str, str]]) -> str:
    return "\n\n".join(
        _indented(f"{each['prompt']}\n\nanswer: {each['answer']}") for each in samples
    )


def _indented(text: str) -> str:
    return "\n".join("    " + line if line.strip() else "" for line in text.splitlines())
