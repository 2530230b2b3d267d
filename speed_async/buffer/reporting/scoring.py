"""Values of an event and of the summary about rewards, their verification and truncation."""

from collections.abc import Sequence

from speed_async.buffer.ledger import Ledger
from speed_async.buffer.membership import ActorState
from speed_async.buffer.reporting.statistics import RunStatistics
from speed_async.environments.outcome_lengths import OutcomeLengths
from speed_async.observability.metrics import Value
from speed_async.types import VerifierOutcome

PARTS = "reward/"
UNSCORED: tuple[VerifierOutcome, ...] = ("timeout", "error")


def scoring_values(
    ledger: Ledger, statistics: RunStatistics, present: Sequence[ActorState]
) -> dict[str, Value]:
    """Values of an event (observability/metrics.py)."""
    lengths = OutcomeLengths(ledger.verifier_sums())
    values: dict[str, Value] = {}
    for outcome in UNSCORED:
        values[f"verifier/{outcome}s"] = lengths.num_completions(outcome)
        values[f"verifier/{outcome}_tokens_mean"] = lengths.mean_tokens(outcome)
        values[f"verifier/{outcome}_length_correlation"] = lengths.length_correlation(outcome)
    values["verifier/scored_tokens_mean"] = lengths.mean_tokens("scored")
    for decision, counts in statistics.truncation.items():
        values[f"truncated/{decision}"] = counts.recent.mean
        values[f"truncated/{decision}_passed"] = counts.num_passed
    return values | _part_means(present)


def scoring_summary(ledger: Ledger, statistics: RunStatistics) -> dict[str, object]:
    """Fields of the summary, over the whole run."""
    truncation = {
        decision: {
            "completions": counts.num_completions,
            "truncated": counts.num_truncated,
            "truncated_passed": counts.num_passed,
        }
        for decision, counts in statistics.truncation.items()
    }
    verifier = OutcomeLengths(ledger.verifier_sums()).summary()
    return {"truncation": truncation, "verifier": verifier}


def _part_means(present: Sequence[ActorState]) -> dict[str, Value]:
    """The mean of each part of the reward: the mean of those that the actors reported."""
    names = sorted({name for state in present for name in state.gauges if name.startswith(PARTS)})
    means: dict[str, Value] = {}
    for name in names:
        reported = [state.gauges[name] for state in present if name in state.gauges]
        means[name] = sum(reported) / len(reported)
    return means
