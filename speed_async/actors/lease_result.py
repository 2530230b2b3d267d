"""Converts the result of a lease to the message that reports it to the service."""

from speed_async.actors.rollout import LeaseProgress
from speed_async.transport import messages as m
from speed_async.transport.groups import pack_group
from speed_async.types import ActorCounts, Group, LeaseKind


def result_message(
    work: LeaseProgress, result: Group | str | None, counts: ActorCounts
) -> m.Message:
    """`result` is what `Rollout.run` returned, or the reason for a failed lease. `counts` are the
    actor's counts, excluding this lease from those in flight."""
    if isinstance(result, Group):
        return pack_group(result, counts)
    lease_id, num_tokens, num_completions = work.lease.lease_id, work.num_tokens, len(work.samples)
    if isinstance(result, str):
        return m.LeaseFailed(
            lease_id=lease_id,
            reason=result,
            num_completions=num_completions,
            num_tokens=num_tokens,
            counts=counts,
        )
    if work.lease.kind is LeaseKind.EVALUATION:
        return m.Evaluated(
            lease_id=lease_id,
            num_passed=work.num_passed,
            num_completions=num_completions,
            num_truncated=work.num_truncated,
            num_truncated_passed=work.num_truncated_passed,
            num_unscored=len(work.unscored),
            num_tokens=num_tokens,
            oldest_version=work.oldest_version or 0,
            newest_version=work.newest_version,
            counts=counts,
        )
    return m.ScreenedOut(
        lease_id=lease_id,
        num_passed=work.num_passed,
        num_completions=num_completions,
        num_truncated=work.num_truncated,
        num_truncated_passed=work.num_truncated_passed,
        num_tokens=num_tokens,
        counts=counts,
    )
