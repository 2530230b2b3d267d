"""Small files in the shapes of published data sets. All rows are invented."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def write_json_lines(path: Path, records: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_json_array(path: Path, records: Sequence[object]) -> Path:
    path.write_text(json.dumps(records))
    return path


def gsm8k_record(question: str, answer: str) -> dict[str, object]:
    """GSM8K: the answer is a worked solution that ends in `#### N`."""
    return {"question": question, "answer": f"We compute <<{answer}={answer}>>.\n#### {answer}"}


def write_dapo(path: Path, problems: Sequence[tuple[str, str]], *, repetitions: int) -> Path:
    """DAPO-Math-17k: chats with an instruction around the problem, each row several times."""
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": BEFORE + problem + AFTER, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"uuid-{index}"},
        }
        for index, (problem, answer) in enumerate(problems)
    ]
    pq.write_table(pa.Table.from_pylist(rows * repetitions), path)
    return path


def write_numinamath(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """NuminaMath-CoT: the last box of the solution is the answer."""
    records = [
        {
            "source": "olympiads",
            "problem": problem,
            "solution": solution,
            "messages": [
                {"content": problem, "role": "user"},
                {"content": solution, "role": "assistant"},
            ],
        }
        for problem, solution in rows
    ]
    pq.write_table(pa.Table.from_pylist(records), path)
    return path
