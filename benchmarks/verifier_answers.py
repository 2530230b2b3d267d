r"""Checks `task.match = "math"` on the answers of data sets.

    python -m benchmarks.verifier_answers math500.json amc23.jsonl

Every answer must equal itself in a box, and must differ from itself with another digit, with the
other sign, and with two entries of a tuple swapped. Files are JSON arrays or JSON lines of objects
with `answer`.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

from speed_async.environments.final_answer import final_answer
from speed_async.environments.mathematics.comparison import same_math
from speed_async.environments.mathematics.extraction import math_answer
from speed_async.environments.mathematics.scoring import is_correct

_PAIR = re.compile(r"\(([^,()]+),([^,()]+)(.*)", re.DOTALL)
_UNSIGNED = re.compile(r"[\d\\][^=,:;&<>]*")


def answers(path: Path) -> list[str]:
    text = path.read_text()
    is_array = text.lstrip().startswith("[")
    records = json.loads(text) if is_array else map(json.loads, text.splitlines())
    return [str(each["answer"]) for each in records if each["answer"] not in (None, "")]


def perturbed(answer: str) -> Iterator[str]:
    """Answers of another value; they are written like `answer`."""
    for digit in re.finditer(r"\d", answer.partition("\\approx")[0]):
        other = str((int(digit.group()) + 1) % 10)
        yield answer[: digit.start()] + other + answer[digit.end() :]
    if _UNSIGNED.fullmatch(answer) and re.search(r"[1-9]", answer) and "\\t" not in answer:
        yield f"-({answer})" if re.search(r"[-+]", answer) else f"-{answer}"
    pair = _PAIR.fullmatch(re.sub(r"\\(?:left|right)\s*", "", answer).strip())
    if pair is not None and pair[1].strip() != pair[2].strip():
        yield f"({pair[2]},{pair[1]}{pair[3]}"


def check(path: Path) -> None:
    rows = answers(path)
    num_decided = num_perturbed = 0
    wrong: list[str] = []
    start_s = time.process_time()
    for answer in rows:
        gold = final_answer(answer)
        candidate = math_answer(f"\\boxed{{{gold}}}")
        if candidate is None or not is_correct(f"\\boxed{{{gold}}}", gold):
            wrong.append(f"{gold!r} differs from itself")
        for other in perturbed(gold):
            num_perturbed += 1
            decided = same_math(other, gold)
            num_decided += decided is not None
            if is_correct(f"\\boxed{{{other}}}", gold):
                wrong.append(f"{other!r} equals {gold!r}")
    cpu_s = time.process_time() - start_s
    print(
        f"{path.name}: {len(rows)} answers and {num_perturbed} perturbed ones, {len(wrong)} wrong, "
        f"{num_decided / num_perturbed:.1%} of the perturbed ones decided by the exact path, "
        f"{(len(rows) + num_perturbed) / cpu_s:,.0f} pairs/s (CPU)"
    )
    print("\n".join(f"    {each}" for each in wrong))


def main() -> None:
    parser = argparse.ArgumentParser(
        description='Checks `task.match = "math"` on the answers of data sets.'
    )
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        check(path)


if __name__ == "__main__":
    main()
