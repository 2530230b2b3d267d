"""What the service says of itself: the values of an event, and the fields of the summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from speed_async.buffer.batches import gate_remedy
from speed_async.observe.metrics import Value
from speed_async.types import GroupEnd

if TYPE_CHECKING:
    from speed_async.buffer.evaluations import Accuracy
    from speed_async.buffer.service import BufferService


def status_values(service: BufferService, now_s: float) -> dict[str, Value]:
    """Gauges that every event carries (keys: observe/metrics.py)."""
    lifecycle, statistics = service.lifecycle, service.statistics
    config = service.config
    present = service.membership.present()
    checks = lifecycle.ledger.checks(lifecycle.leases.num_training)
    values: dict[str, Value] = {
        "wall_s": round(now_s - service.started_s, 3),
        "policy_version": service.policy_version,
        "updates_total": config.run.updates,
        "phase": service.phase,
        "generated_tokens_per_s": statistics.generated_per_s(now_s),
        "trained_tokens_per_s": statistics.trained_per_s(now_s),
        "tokens_generated": lifecycle.ledger.tokens_generated,
        "tokens_evaluation": lifecycle.ledger.evaluation.tokens,
        "gate_acceptance": statistics.gate_acceptance,
        "buffer_groups": len(lifecycle.buffer),
        "buffer_capacity": config.buffer.capacity_groups,
        "in_flight_groups": lifecycle.leases.num_training,
        "credits": lifecycle.leases.num_training + lifecycle.credits_left,
        "staleness_mean": statistics.staleness_last_mean,
        "staleness_max": statistics.staleness_max,
        "max_staleness": config.buffer.max_staleness,
        "actors_alive": len(present),
        "actors_slots_busy": sum(state.gauges.get("slots_busy", 0.0) for state in present),
        "actors_slots": sum(state.gauges.get("num_slots", 0.0) for state in present),
        "reward_mean": statistics.reward_mean,
        "accuracy": statistics.accuracy_last,
        "accuracy_before": statistics.accuracy_first,
        "bottleneck": statistics.bottleneck(),
        "eta_s": statistics.eta_s(config.run.updates - service.policy_version),
        "groups_failed": lifecycle.ledger.ends[GroupEnd.FAILED].groups,
        "groups_stale": lifecycle.ledger.ends[GroupEnd.STALE].groups,
        "groups_evicted": lifecycle.ledger.ends[GroupEnd.EVICTED].groups,
        "ledger_closes": all(checks.values()),
        "loop_lag_s": service.loop_lag_s,
        "actors_total": service.membership.num_wanted,
        "warning": "; ".join(filter(None, (service.notes, service.warning))),
        "peers_muted": service.gatekeeper.num_muted,
        "messages_refused": service.gatekeeper.num_refused + service.gatekeeper.num_malformed,
    }
    values["learner_here"] = service.membership.learner is not None
    done, total = service.evaluation_progress or (None, None)
    values |= {"evaluated_prompts": done, "evaluation_prompts": total}
    shares = statistics.shares()
    values |= {f"share_{name}": share for name, share in shares.items()}
    return values | service.learner.weight_times.values(service.policy_version, present, now_s)


def evaluation_values(whole: Accuracy) -> dict[str, Value]:
    """What an evaluation event adds."""
    return {
        "policy_version": whole.policy_version,
        "num_passed": whole.num_passed,
        "num_completions": whole.num_completions,
        "oldest_version": whole.oldest_version,
        "newest_version": whole.newest_version,
    }


def stall_reason(service: BufferService) -> str:
    """What a person needs to know when the learner gets no batch."""
    lifecycle, statistics = service.lifecycle, service.statistics
    present = service.membership.present()
    failures = ", ".join(f"{n} x {kind}" for kind, n in lifecycle.ledger.failures.items())
    facts = [
        f"{len(present)} actor{'s' if len(present) != 1 else ''} present",
        f"{statistics.num_screened} prompts screened",
        f"{statistics.num_accepted} passed the gate",
        f"pass rate of the last ones {statistics.reward_mean or 0.0:.3f}",
        f"failed groups: {failures or 'none'}",
    ]
    if not present:
        remedy = "no actor joined or stayed; read logs/actor-*.log"
    elif statistics.num_screened and not statistics.num_accepted:
        remedy = gate_remedy(service.config.gate, statistics.reward_mean or 0.0)
    else:
        remedy = "raise cluster.stall_timeout_s, or lower learner.groups_per_update"
    return "; ".join(facts) + f". Remedy: {remedy}"


def summary_values(
    service: BufferService, now_s: float, *, final_evaluated: bool
) -> dict[str, object]:
    """The service's part of summary.json. `accuracy_after` is the last version's, or None. `wall_s`
    is the machine's time, which stands still while nobody can go on (observe/metrics.py)."""
    lifecycle, statistics = service.lifecycle, service.statistics
    first_s = statistics.first_token_s
    generating_s = now_s - first_s if first_s is not None else 0.0
    tokens = lifecycle.ledger.tokens_generated
    return {
        "accuracy_before": statistics.accuracy_first,
        "accuracy_after": statistics.accuracy_last if final_evaluated else None,
        "accuracy_last": statistics.accuracy_last,
        "wall_s": now_s - service.started_s,
        "tokens_generated": tokens,
        "completions_generated": lifecycle.ledger.completions_generated,
        "tokens_per_s": tokens / generating_s if generating_s > 0 else 0.0,
        "prompts_screened": statistics.num_screened,
        "distinct_prompts_screened": len(statistics.prompts_seen),
        "distinct_prompts_accepted": len(statistics.prompts_accepted),
        "gate_acceptance": statistics.gate_acceptance_overall,
        "staleness_mean": statistics.staleness_mean,
        "staleness_max": statistics.staleness_max,
        "weights": service.learner.weight_times.summary(),
        "peers_muted": service.gatekeeper.num_muted,
        "messages_refused": service.gatekeeper.num_refused + service.gatekeeper.num_malformed,
        "actors": lifecycle.ledger.by_actor(),
        "ledger": lifecycle.ledger.table(lifecycle.leases.num_training),
        "lives": service.life + 1,
        "updates_repeated": service.lifecycle.lineage.num_repeated,
        "updates_repeated_alike": service.lifecycle.lineage.num_repeated_alike,
        "breakdown": {"learner": _learner_times(service), "actors": _actor_times(service)},
    }


def _learner_times(service: BufferService) -> dict[str, float]:
    """Seconds of the learner's whole training, by what they went into."""
    parts_s = service.statistics.learner_parts_s
    return {
        "waiting for groups": parts_s["actor"],
        "receiving the batch": parts_s["buffer"],
        "training": parts_s["learner"],
        "publishing weights": parts_s["sync"],
    }


def _actor_times(service: BufferService) -> dict[str, float]:
    """Seconds of all actors' engines, by what they went into, as last reported."""
    gauges = [state.gauges for state in service.membership.actors.values()]
    sampling_s = sum(gauge.get("sampling_s", 0.0) for gauge in gauges)
    updating_s = sum(gauge.get("updating_s", 0.0) for gauge in gauges)
    uptime_s = sum(gauge.get("uptime_s", 0.0) for gauge in gauges)
    return {
        "sampling": sampling_s,
        "taking in weights": updating_s,
        "idle": max(0.0, uptime_s - sampling_s - updating_s),
    }
