r"""Compares the rules of `task.match = "math"` with those of other libraries on labelled answers.

    python -m benchmarks.verifier                     # every rule; minutes, because some hang
    python -m benchmarks.verifier --rule exact_path   # one rule

The corpus is benchmarks/data/verifier_corpus.jsonl, one object per line: `kind`, `prompt`,
`completion`, `answer`, `label` (whether the completion is right). `<<text*n>>` stands for n copies
of a text. Labels are by hand. The kind `later` was written after the rules and judged once.
docs/verifier.md shows the tables.
"""

import argparse
import json
import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as CallTimeout
from dataclasses import dataclass
from pathlib import Path

from pebble import ProcessPool

CORPUS = Path(__file__).parent / "data" / "verifier_corpus.jsonl"
TIMEOUT_S = 30.0
"""Of one call; above the own timeouts of math-verify and TRL."""
FALSE_POSITIVE_COST = 5
_REPEATED = re.compile(r"<<(.+?)\*(\d+)>>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    kind: str
    prompt: str
    completion: str
    answer: str
    label: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a rule says about one pair."""

    verdict: bool | None
    """None: undecided, timed out or failed; `fault` tells which."""
    fault: str = ""
    cpu_s: float | None = None
    """None when the call did not return."""
    timed_out_silently: bool = False
    """math-verify gave up within its own time limit, and the verdict is `different`."""


def read_corpus(path: Path = CORPUS) -> list[Pair]:
    pairs: list[Pair] = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        texts = {key: expanded(record[key]) for key in ("completion", "answer")}
        pairs.append(Pair(**record | texts))
    return pairs


def expanded(text: str) -> str:
    return _REPEATED.sub(lambda match: match[1] * int(match[2]), text)


def exact_path(completion: str, answer: str) -> bool | None:
    from speed_async.environments.mathematics.comparison import same_math
    from speed_async.environments.mathematics.extraction import math_answer

    candidate = math_answer(completion)
    return False if candidate is None else same_math(candidate, answer)


def speed_async(completion: str, answer: str) -> bool:
    from speed_async.environments.mathematics.scoring import is_correct

    return is_correct(completion, answer)


def math_verify_alone(completion: str, answer: str) -> bool:
    from benchmarks.verifier_peers import math_verify_alone

    return math_verify_alone(completion, answer)


def trl_accuracy_reward(completion: str, answer: str) -> bool:
    from benchmarks.verifier_peers import trl_accuracy_reward

    return trl_accuracy_reward(completion, answer)


def verl_math(completion: str, answer: str) -> bool:
    from benchmarks.verifier_peers import verl_math

    return verl_math(completion, answer)


def verl_math_dapo(completion: str, answer: str) -> bool:
    from benchmarks.verifier_peers import verl_math_dapo

    return verl_math_dapo(completion, answer)


Rule = Callable[[str, str], bool | None]
RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        speed_async,
        exact_path,
        math_verify_alone,
        trl_accuracy_reward,
        verl_math,
        verl_math_dapo,
    )
}


def judge(rule: Rule, pairs: Sequence[Pair], timeout_s: float = TIMEOUT_S) -> list[Outcome]:
    """Outcomes in a process that is replaced when a call exceeds `timeout_s`."""
    with ProcessPool(1, initializer=_warm_up, initargs=(rule,)) as pool:
        return [_outcome(pool, rule, pair, timeout_s) for pair in pairs]


def _outcome(pool: ProcessPool, rule: Rule, pair: Pair, timeout_s: float) -> Outcome:
    call = pool.schedule(_timed, (rule, pair.completion, pair.answer), timeout=timeout_s)
    try:
        verdict, cpu_s, timed_out_silently = call.result()
    except CallTimeout:
        return Outcome(verdict=None, fault="timeout")
    except Exception as error:  # a rule of another library may raise anything
        return Outcome(verdict=None, fault=type(error).__name__)
    return Outcome(
        verdict=verdict,
        fault="undecided" if verdict is None else "",
        cpu_s=cpu_s,
        timed_out_silently=timed_out_silently,
    )


def _warm_up(rule: Rule) -> None:
    rule("\\boxed{\\frac{1}{2}}", "1/3")


class _TimeoutRecords(logging.Handler):
    """Counts the timeouts that math-verify only logs."""

    def __init__(self) -> None:
        super().__init__()
        self.num_timeouts = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.num_timeouts += record.getMessage().startswith("Timeout during")


def _timed(rule: Rule, completion: str, answer: str) -> tuple[bool | None, float, bool]:
    """The verdict, its CPU time, and whether math-verify timed out silently."""
    records = _TimeoutRecords()
    logger = logging.getLogger("math_verify")
    logger.propagate = False
    logger.addHandler(records)
    start_s = time.process_time()
    verdict = rule(completion, answer)
    cpu_s = time.process_time() - start_s
    logger.removeHandler(records)
    return None if verdict is None else bool(verdict), cpu_s, records.num_timeouts > 0


def summary(name: str, pairs: Sequence[Pair], outcomes: Sequence[Outcome]) -> str:
    """One row of the table."""
    judged = list(zip(pairs, outcomes, strict=True))
    num_false = sum(not pair.label for pair in pairs)
    false_positives = sum(not pair.label and each.verdict is True for pair, each in judged)
    false_negatives = sum(pair.label and each.verdict is False for pair, each in judged)
    faults = [each.fault for each in outcomes if each.fault]
    times_s = [each.cpu_s for each in outcomes if each.cpu_s is not None]
    return (
        f"| {name} | {false_positives} ({false_positives / num_false:.1%}) "
        f"| {false_negatives} ({false_negatives / (len(pairs) - num_false):.1%}) "
        f"| {FALSE_POSITIVE_COST * false_positives + false_negatives} "
        f"| {len(faults)} | {sum(each.timed_out_silently for each in outcomes)} "
        f"| {_length_correlation(pairs, outcomes)} | {len(times_s) / sum(times_s):,.0f} "
        f"| {1e3 * statistics.median(times_s):.2f} | {1e3 * max(times_s):,.0f} |"
    )


def _length_correlation(pairs: Sequence[Pair], outcomes: Sequence[Outcome]) -> str:
    """Pearson's correlation of timeouts and errors with log10 of the completion's length."""
    failed = [float(each.timed_out_silently or bool(each.fault)) for each in outcomes]
    if len(set(failed)) < 2:
        return "-"
    lengths = [math.log10(1 + len(pair.completion)) for pair in pairs]
    return f"{statistics.correlation(lengths, failed):+.2f}"


def by_kind(pairs: Sequence[Pair], columns: dict[str, list[Outcome]]) -> list[str]:
    """Rows with false positives / false negatives / no verdict of each rule."""
    rows: list[str] = []
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        indices = [index for index, pair in enumerate(pairs) if pair.kind == kind]
        cells: list[str] = []
        for outcomes in columns.values():
            results = [(pairs[index].label, outcomes[index].verdict) for index in indices]
            wrong = (results.count((False, True)), results.count((True, False)))
            num_none = sum(verdict is None for _, verdict in results)
            cells.append(f"{wrong[0]} / {wrong[1]} / {num_none}")
        rows.append(f"| {kind} | {len(indices)} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description='Compares rules for `task.match = "math"` on labelled answers.'
    )
    parser.add_argument("--rule", choices=tuple(RULES), action="append")
    parser.add_argument("--kind", help="only the pairs of this kind")
    parser.add_argument("--wrong", action="store_true", help="list the pairs judged wrongly")
    arguments = parser.parse_args()
    pairs = [pair for pair in read_corpus() if arguments.kind in (None, pair.kind)]
    columns: dict[str, list[Outcome]] = {}
    print(f"{len(pairs)} pairs, {sum(pair.label for pair in pairs)} of them right\n")
    print(
        "| rule | false positives | false negatives | 5 FP + FN | no verdict | silent timeouts "
        "| their correlation with length | pairs/s (CPU) | median ms | longest ms |"
    )
    for name in arguments.rule or RULES:
        columns[name] = judge(RULES[name], pairs)
        print(summary(name, pairs, columns[name]), flush=True)
        for pair, outcome in zip(pairs, columns[name], strict=True):
            if arguments.wrong and outcome.verdict is not pair.label:
                text = pair.completion[-70:]
                print(f"    {pair.kind}: {text!r} {pair.answer[:40]!r} {pair.label} {outcome}")
    print(f"\n| kind | pairs | {' | '.join(columns)} |")
    print("\n".join(by_kind(pairs, columns)))


if __name__ == "__main__":
    main()
