"""A learner that trains nothing: it takes batches as fast as they come and reports them trained.

The policy version stays 0, so that no group becomes stale and nothing is broadcast. Runs in a
separate process, with the real messages over the real link.
"""

from multiprocessing.synchronize import Event

from speed_async.errors import DeadlineExceeded
from speed_async.launcher.event_loop import run
from speed_async.transport import messages as m
from speed_async.transport.transport import Link
from speed_async.transport.zeromq import open_link

NAME = "learner"
POLL_S = 0.2
END_TIMEOUT_S = 60.0


def run_stand_in_learner(
    port: int, fingerprint: str, model_fingerprint: str, num_groups: int, stop: Event
) -> None:
    """Entry point of the process. Returns when the run has finished after `stop`."""
    run(_serve(port, fingerprint, model_fingerprint, num_groups, stop))


async def _serve(
    port: int, fingerprint: str, model_fingerprint: str, num_groups: int, stop: Event
) -> None:
    link = await open_link("127.0.0.1", port, NAME)
    hello = m.Hello(
        role="learner",
        index=0,
        incarnation=0,
        fingerprint=fingerprint,
        model_fingerprint=model_fingerprint,
        process_id=0,
    )
    await link.send(hello)
    groups_trained = completions_trained = tokens_trained = 0
    while (batch := await _take(link, num_groups, stop)) is not None:
        groups_trained += len(batch)
        completions_trained += sum(len(group.lengths) for group in batch)
        tokens_trained += sum(len(group.token_ids) for group in batch)
        await link.send(
            m.Trained(
                policy_version=0,
                lease_ids=[group.lease_id for group in batch],
                skipped=False,
                groups_trained=groups_trained,
                completions_trained=completions_trained,
                tokens_trained=tokens_trained,
                metrics={},
            )
        )
    await link.send(m.FinishRun(policy_version=0, evaluate=False, reason="measured"))
    while not isinstance(message := await link.receive(END_TIMEOUT_S), m.Summary):
        pass
    await link.close()
    ledger = message.fields["ledger"]
    assert isinstance(ledger, dict) and ledger["closes"], f"unbalanced ledger: {ledger}"


async def _take(link: Link, num_groups: int, stop: Event) -> list[m.GroupFinished] | None:
    """The next batch. None if `stop` is set first."""
    await link.send(m.TakeBatch(policy_version=0, num_groups=num_groups))
    groups: list[m.GroupFinished] = []
    while True:
        try:
            message = await link.receive(POLL_S)
        except DeadlineExceeded:
            if stop.is_set() and not groups:
                return None
            continue
        if isinstance(message, m.GroupFinished):
            groups.append(message)
        elif isinstance(message, m.BatchReady):
            return groups
