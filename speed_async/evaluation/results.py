"""What the samples of one suite show: accuracy, intervals, lengths, truncation, format, levels."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from speed_async.environments.matching import MatchKind
from speed_async.evaluation.answers import answer_classes
from speed_async.evaluation.records import SampleRecord
from speed_async.evaluation.statistics import (
    Estimate,
    Vote,
    bootstrap,
    majority,
    pass_at_k,
    pass_ks,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStatistics:
    """Lengths of completions, in tokens; NaN when there is none."""

    mean: float
    median: float
    percentile_95: float
    max: float
    mean_passed: float
    mean_failed: float
    mean_unscored: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelResult:
    level: str
    num_prompts: int
    mean: Estimate
    mean_tokens: float
    truncated: float
    """Share of completions that ended by a length limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteResult:
    """Results of one suite under one model. Completions without a verdict are in no accuracy."""

    suite: str
    num_prompts: int
    num_samples: int
    """k: samples per prompt."""
    mean: Estimate
    """mean@k: mean over prompts of the share of their samples that passed."""
    pass_at: dict[int, Estimate]
    """pass@k by k, unbiased. A prompt with fewer than k verdicts has no value."""
    majority: Estimate
    """maj@k: whether the most frequent extracted answer is correct."""
    num_ties: int
    """Prompts with several most frequent answers; their value is the share that is correct."""
    truncated: float
    """Share of completions that ended by a length limit."""
    answered: float
    """Share of completions with a verdict from which an answer was extracted."""
    tokens: TokenStatistics
    outcomes: dict[str, int]
    """Completions by outcome of the verifier."""
    mean_if_unscored_failed: float
    mean_if_unscored_passed: float
    levels: tuple[LevelResult, ...]
    num_completions: int

    @property
    def num_unscored(self) -> int:
        return sum(count for outcome, count in self.outcomes.items() if outcome != "scored")

    @property
    def is_complete(self) -> bool:
        return self.num_completions == self.num_prompts * self.num_samples

    def as_json(self) -> dict[str, Any]:
        """Plain values; NaN is None, because JSON has no NaN."""
        return _without_nan(asdict(self) | {"is_complete": self.is_complete})


def summarize(
    suite: str,
    records: Iterable[SampleRecord],
    *,
    num_prompts: int,
    num_samples: int,
    match: MatchKind,
) -> SuiteResult:
    """Results from the samples of a suite; samples beyond `num_samples` are ignored.

    `match` says which answers are equal in a vote.
    """
    used = [each for each in records if each.sample < num_samples]
    prompts = by_prompt(used)
    votes = [_vote(each, match) for each in prompts.values()]
    scored = [each for each in used if each.outcome == "scored"]
    return SuiteResult(
        suite=suite,
        num_prompts=num_prompts,
        num_samples=num_samples,
        mean=bootstrap([share_passed(each) for each in prompts.values()]),
        pass_at={
            k: bootstrap([_pass_at(each, k) for each in prompts.values()])
            for k in pass_ks(num_samples)
        },
        majority=bootstrap([math.nan if vote is None else vote.value for vote in votes]),
        num_ties=sum(vote is not None and vote.num_tied > 1 for vote in votes),
        truncated=_mean(each.is_truncated for each in used),
        answered=_mean(each.extracted is not None for each in scored),
        tokens=_token_statistics(used),
        outcomes=dict(Counter(each.outcome for each in used)),
        mean_if_unscored_failed=_mean_if_unscored(prompts, passed=False),
        mean_if_unscored_passed=_mean_if_unscored(prompts, passed=True),
        levels=_levels(used),
        num_completions=len(used),
    )


def by_prompt(records: Iterable[SampleRecord]) -> dict[int, list[SampleRecord]]:
    """Samples by prompt id, both in ascending order."""
    prompts: dict[int, list[SampleRecord]] = defaultdict(list)
    for record in sorted(records, key=lambda each: each.key):
        prompts[record.prompt_id].append(record)
    return dict(prompts)


def share_passed(records: Sequence[SampleRecord]) -> float:
    """Share of the samples with a verdict that passed; NaN without any."""
    return _mean(each.passed for each in records if each.outcome == "scored")


def majority_value(records: Sequence[SampleRecord], match: MatchKind) -> float:
    """maj@k of one prompt; NaN without any verdict."""
    vote = _vote(records, match)
    return math.nan if vote is None else vote.value


def _vote(records: Sequence[SampleRecord], match: MatchKind) -> Vote | None:
    scored = [each for each in records if each.outcome == "scored"]
    if not scored:
        return None
    classes = answer_classes([each.extracted for each in scored], match)
    return majority(classes, [each.passed for each in scored])


def _pass_at(records: Sequence[SampleRecord], k: int) -> float:
    scored = [each.passed for each in records if each.outcome == "scored"]
    return pass_at_k(len(scored), sum(scored), k) if k <= len(scored) else math.nan


def _mean_if_unscored(prompts: dict[int, list[SampleRecord]], *, passed: bool) -> float:
    return _mean(
        _mean(each.passed if each.outcome == "scored" else passed for each in records)
        for records in prompts.values()
    )


def _levels(records: Sequence[SampleRecord]) -> tuple[LevelResult, ...]:
    """Results by level, if there are several."""
    levels: dict[str, list[SampleRecord]] = defaultdict(list)
    for record in records:
        levels[record.level].append(record)
    if len(levels) < 2:
        return ()
    return tuple(
        LevelResult(
            level=level,
            num_prompts=len(prompts := by_prompt(levels[level])),
            mean=bootstrap([share_passed(each) for each in prompts.values()]),
            mean_tokens=_mean(each.num_tokens for each in levels[level]),
            truncated=_mean(each.is_truncated for each in levels[level]),
        )
        for level in sorted(levels, key=_natural_order)
    )


def _natural_order(level: str) -> tuple[float, str]:
    """Numbers by value, then texts; a text with a trailing number is ordered by it."""
    digits = level[len(level.rstrip("0123456789.")) :]
    try:
        return float(digits), level
    except ValueError:
        return math.inf, level


def _token_statistics(records: Sequence[SampleRecord]) -> TokenStatistics:
    lengths = [each.num_tokens for each in records]
    scored = [each for each in records if each.outcome == "scored"]
    return TokenStatistics(
        mean=_mean(lengths),
        median=float(np.median(lengths)) if lengths else math.nan,
        percentile_95=float(np.quantile(lengths, 0.95)) if lengths else math.nan,
        max=max(lengths, default=math.nan),
        mean_passed=_mean(each.num_tokens for each in scored if each.passed),
        mean_failed=_mean(each.num_tokens for each in scored if not each.passed),
        mean_unscored=_mean(each.num_tokens for each in records if each.outcome != "scored"),
    )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else math.nan


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
