"""Converts the result of a lease to the message that reports it to the service."""

from speed_async.actors.rollout import EvaluationResult, GateRejection, LeaseProgress
from speed_async.transport import messages as m
from speed_async.transport.groups import pack_group
from speed_async.types import ActorCounts, Group

Result = Group | GateRejection | EvaluationResult | str
"""A string is the reason for a failed lease."""


def result_message(work: LeaseProgress, result: Result, counts: ActorCounts) -> m.Message:
    """`counts` are the actor's counts, excluding this lease from those in flight."""
    lease_id, num_tokens, num_completions = work.lease.lease_id, work.num_tokens, len(work.samples)
    num_truncated = sum(sample.finish_reason == "length" for sample in work.samples)
    match result:
        case Group():
            return pack_group(result, counts)
        case GateRejection():
            return m.ScreenedOut(
                lease_id=lease_id,
                num_passed=result.num_passed,
                num_completions=num_completions,
                num_truncated=num_truncated,
                num_tokens=num_tokens,
                counts=counts,
            )
        case EvaluationResult():
            return m.Evaluated(
                lease_id=lease_id,
                num_passed=result.num_passed,
                num_completions=num_completions,
                num_truncated=num_truncated,
                num_tokens=num_tokens,
                oldest_version=result.oldest_version if num_tokens else 0,
                newest_version=result.newest_version if num_tokens else 0,
                counts=counts,
            )
        case str():
            return m.LeaseFailed(
                lease_id=lease_id,
                reason=result,
                num_completions=num_completions,
                num_tokens=num_tokens,
                counts=counts,
            )
