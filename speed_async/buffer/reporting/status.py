"""The service's status: the values of an event, and the fields of the summary.

These functions read the components of the service and change none.
"""

from collections.abc import Sequence

from speed_async.buffer.components import Components
from speed_async.buffer.evaluations import Accuracy, EvaluationPlan
from speed_async.buffer.ledger import ENGINE_TIMES, Ledger
from speed_async.buffer.membership import ActorState
from speed_async.buffer.reporting.rules import gate_remedy, shortened
from speed_async.buffer.reporting.scoring import scoring_summary, scoring_values
from speed_async.buffer.reporting.statistics import RunStatistics
from speed_async.buffer.state import ServiceState
from speed_async.buffer.validation import MessageValidator
from speed_async.observability.metrics import Event, Value
from speed_async.transport.messages import Sample
from speed_async.types import GroupEnd

SUITE_RESULT_KEYS = (
    "policy_version",
    "requested_version",
    "mean",
    "num_completions",
    "num_unscored",
    "num_truncated",
    "oldest_version",
    "newest_version",
)
"""Values of an evaluation in the summary."""


def status_values(
    parts: Components, validator: MessageValidator, state: ServiceState, now_s: float
) -> dict[str, Value]:
    """Gauges in every event (keys: observability/metrics.py)."""
    lifecycle, statistics = parts.lifecycle, parts.statistics
    present = parts.membership.present()
    checks = lifecycle.ledger.checks(lifecycle.leases.num_training)
    values: dict[str, Value] = {
        "wall_s": round(now_s - statistics.started_s, 3),
        "policy_version": lifecycle.groups.policy_version,
        "updates_total": parts.config.run.updates,
        "phase": state.phase,
        "generated_tokens_per_s": statistics.generated_per_s(now_s),
        "trained_tokens_per_s": statistics.trained_per_s(now_s),
        "tokens_generated": lifecycle.ledger.tokens_generated,
        "tokens_evaluation": lifecycle.ledger.evaluation.tokens,
        "gate_acceptance": statistics.gate_acceptance if _has_gate(parts) else None,
        "buffer_groups": len(lifecycle.groups.buffer),
        "buffer_capacity": parts.config.capacity_groups,
        "in_flight_groups": lifecycle.leases.num_training,
        "credits": lifecycle.leases.num_training + lifecycle.credits_left(),
        "staleness_mean": statistics.staleness_last_mean,
        "staleness_max": statistics.staleness_max,
        "max_staleness": parts.config.buffer.max_staleness,
        "actors_alive": len(present),
        "actors_slots_busy": _gauge_sum(present, "slots_busy"),
        "actors_slots": _gauge_sum(present, "num_slots"),
        "reward_mean": statistics.reward_mean,
        "diagnoses": "\n".join(parts.diagnoses.active),
        "accuracy": statistics.accuracy_last,
        "accuracy_version": statistics.accuracy_last_version,
        "accuracy_before": statistics.accuracy_first,
        "bottleneck": statistics.bottleneck(),
        "eta_s": statistics.eta_s(parts.config.run.updates - lifecycle.groups.policy_version),
        "groups_failed": lifecycle.ledger.ends[GroupEnd.FAILED].groups,
        "groups_stale": lifecycle.ledger.ends[GroupEnd.STALE].groups,
        "groups_evicted": lifecycle.ledger.ends[GroupEnd.EVICTED].groups,
        "ledger_closes": all(checks.values()),
        "loop_lag_s": state.loop_lag_s,
        "actors_total": parts.membership.num_expected,
        "warning": parts.warnings.text,
        "peers_muted": validator.num_blocked,
        "messages_refused": validator.num_refused + validator.num_malformed,
    }
    values["learner_here"] = parts.membership.learner is not None
    done, total = parts.evaluations.progress or (None, None)
    values |= {"evaluated_prompts": done, "evaluation_prompts": total}
    shares = statistics.shares()
    values |= {f"share_{name}": share for name, share in shares.items()}
    values |= scoring_values(lifecycle.ledger, statistics, present)
    return values | parts.weight_times.values(lifecycle.groups.policy_version, present, now_s)


def sample_event(actor: str, sample: Sample, wall_s: float) -> Event:
    """The event of a sampled completion."""
    values: dict[str, Value] = {
        "wall_s": round(wall_s, 3),
        "policy_version": sample.policy_version,
        "actor": actor,
        "prompt_id": sample.prompt_id,
        "held_out": sample.held_out,
        "decision": sample.decision,
        "reward": sample.reward,
        "passed": sample.passed,
        "extracted": sample.extracted if sample.is_extracted else None,
        "truncated": sample.truncated,
        "num_tokens": sample.num_tokens,
        "prompt": sample.prompt,
        "completion": sample.completion,
    }
    return Event(kind="sample", values=values)


def stall_reason(parts: Components) -> str:
    """Human-readable reason why the learner gets no batch."""
    lifecycle, statistics = parts.lifecycle, parts.statistics
    present = parts.membership.present()
    failures = ", ".join(f"{n} x {kind}" for kind, n in lifecycle.ledger.failures.items())
    facts = [f"{len(present)} actor{'s' if len(present) != 1 else ''} present"]
    if _has_gate(parts):
        facts += [f"{statistics.num_screened} prompts screened"]
        facts += [f"{statistics.num_accepted} passed the gate"]
    else:
        facts += [f"{statistics.num_screened} prompts sampled"]
    if statistics.reward_mean is not None:
        facts += [f"pass rate of the last ones {statistics.reward_mean:.3f}"]
    if unusable := lifecycle.unusable.describe():
        facts.append(unusable)
    facts += [f"failed groups: {failures or 'none'}"]
    return "; ".join(facts) + f". {_stall_remedy(parts, len(present))}"


def _stall_remedy(parts: Components, num_present: int) -> str:
    """The active diagnoses, or a remedy derived from the counters."""
    statistics, ledger = parts.statistics, parts.lifecycle.ledger
    if not num_present:
        return "Remedy: no actor joined or stayed connected; read logs/actor-*.log"
    if active := parts.diagnoses.active:
        return "; ".join(active)
    failed = ledger.failures
    if failed and sum(failed.values()) >= statistics.num_screened:
        kind = max(failed, key=lambda kind: failed[kind])
        example = shortened(ledger.failure_examples.get(kind, kind))
        return f"Remedy: prompts fail, for example: {example}"
    if statistics.num_screened and not statistics.num_accepted:
        return f"Remedy: {gate_remedy(parts.config.gate, statistics.reward_mean or 0.0)}"
    return "Remedy: raise cluster.stall_timeout_s, or lower learner.groups_per_update"


def summary_fields(
    parts: Components,
    validator: MessageValidator,
    now_s: float,
    *,
    attempt: int,
    final_evaluated: bool,
) -> dict[str, object]:
    """The service's part of summary.json. `attempt` is the current one, from 0.

    `accuracy_after` belongs to the last version, and is None if that was not evaluated or no
    update was made. `wall_s` is the machine's time, which stops while the run cannot proceed
    (observability/metrics.py).
    """
    lifecycle, statistics = parts.lifecycle, parts.statistics
    first_s = statistics.first_token_s
    generating_s = now_s - first_s if first_s is not None else 0.0
    tokens = lifecycle.ledger.tokens_generated
    is_later = statistics.accuracy_last_version != statistics.accuracy_first_version
    return {
        "accuracy_before": statistics.accuracy_first,
        "accuracy_before_version": statistics.accuracy_first_version,
        "accuracy_after": statistics.accuracy_last if final_evaluated and is_later else None,
        "accuracy_last": statistics.accuracy_last,
        "accuracy_last_version": statistics.accuracy_last_version,
        "wall_s": now_s - statistics.started_s,
        "tokens_generated": tokens,
        "completions_generated": lifecycle.ledger.completions_generated,
        "tokens_per_s": tokens / generating_s if generating_s > 0 else None,
        "prompts_screened": statistics.num_screened,
        "distinct_prompts_screened": len(statistics.prompts_seen),
        "distinct_prompts_accepted": len(statistics.prompts_accepted),
        "gate_acceptance": statistics.gate_acceptance_overall if _has_gate(parts) else None,
        "staleness_mean": statistics.staleness_mean,
        "staleness_max": statistics.staleness_max,
        "weights": parts.weight_times.summary(),
        "peers_muted": validator.num_blocked,
        "messages_refused": validator.num_refused + validator.num_malformed,
        "actors": lifecycle.ledger.by_actor(),
        "ledger": lifecycle.ledger.table(lifecycle.leases.num_training),
        "diagnoses": parts.diagnoses.record(),
        **scoring_summary(lifecycle.ledger, statistics),
        "suites": {plan.suite: _suite_fields(plan) for plan in parts.evaluations.plans},
        "attempts": attempt + 1,
        "updates_repeated": lifecycle.groups.lineage.num_repeated,
        "updates_repeated_alike": lifecycle.groups.lineage.num_repeated_identical,
        "breakdown": {
            "learner": _learner_times(statistics),
            "actors": _actor_times(lifecycle.ledger),
        },
    }


def _learner_times(statistics: RunStatistics) -> dict[str, float]:
    """Seconds of the learner's total training time by activity. Empty before the first
    update."""
    parts_s = statistics.learner_parts_s
    if not parts_s:
        return {}
    return {
        "waiting for groups": parts_s["actor"],
        "receiving the batch": parts_s["buffer"],
        "training": parts_s["learner"],
        "publishing weights": parts_s["sync"],
        "waiting for checkpoints": parts_s["checkpoint"],
    }


def _actor_times(ledger: Ledger) -> dict[str, float]:
    """Engine seconds of all actors of the run, past ones included, by activity, as last
    reported."""
    times_s = ledger.engine_times_s()
    if not times_s:
        return {}
    sampling_s, updating_s, uptime_s = (times_s[name] for name in ENGINE_TIMES)
    return {
        "sampling": sampling_s,
        "taking in weights": updating_s,
        "idle": max(0.0, uptime_s - sampling_s - updating_s),
    }


def _has_gate(parts: Components) -> bool:
    """Whether prompts are screened. Without a gate there is no acceptance rate."""
    return parts.config.gate.mode != "off"


def evaluation_values(result: Accuracy, num_samples: int) -> dict[str, Value]:
    """Additional values of an evaluation event. `num_samples`: completions per prompt."""
    return {
        "suite": result.suite,
        "policy_version": result.sampled_version,
        "requested_version": result.policy_version,
        "mean": result.accuracy,
        "num_samples": num_samples,
        "num_passed": result.num_passed,
        "num_completions": result.num_completions,
        "num_unscored": result.num_unscored,
        "num_truncated": result.num_truncated,
        "oldest_version": result.oldest_version,
        "newest_version": result.newest_version,
    }


def _suite_fields(plan: EvaluationPlan) -> dict[str, object]:
    """The summary of a suite: its first, last and best evaluation, if there are any."""
    fields: dict[str, object] = {"num_samples": plan.num_samples}
    if plan.results is not None:
        shown = {
            "first": plan.results.first,
            "last": plan.results.last,
            "best": plan.results.best,
        }
        for name, result in shown.items():
            values = evaluation_values(result, plan.num_samples)
            fields[name] = {key: values[key] for key in SUITE_RESULT_KEYS}
    return fields


def _gauge_sum(present: Sequence[ActorState], name: str) -> float | None:
    """Sum over the actors that reported the gauge. None if none did."""
    reported = [state.gauges[name] for state in present if name in state.gauges]
    return sum(reported) if reported else None
