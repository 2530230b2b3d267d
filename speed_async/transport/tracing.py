"""A link that traces its messages to a file: groups that an actor sent or a learner trained.

For fault injection tests (`observe.trace`). The trace is the independent record that shows whether
a group was lost or trained twice. Each line is one write, made before a message is sent and after
one is received, so a killed process lacks at most its last line.
"""

import json
import os
import time
import zlib
from pathlib import Path

from speed_async.transport import messages as m
from speed_async.transport.transport import Link


def group_digest(group: m.GroupFinished) -> str:
    """Identify a group on both sides of the service: lease, prompt and sampled tokens."""
    crc = zlib.crc32(group.token_ids.tobytes())
    crc = zlib.crc32(group.policy_versions.tobytes(), crc)
    crc = zlib.crc32(group.rewards.tobytes(), crc)
    return f"{group.lease_id}.{group.prompt_id}.{crc:08x}"


class TracedLink:
    """A `Link` around another one. Writes JSON lines with the wall-clock time `time_s`:

    sent     result of one lease of an actor: `end`, its `tokens`, the `number` of the message and
             the total `generated` of the actor; a group has a `group` digest
    counted  any other message of an actor: `number` and `generated`
    acked    the service acknowledged all messages up to `number`
    taken    a batch was received: its `groups`, in order, and the `policy_version` of the request
    trained  an update: `policy_version` after it, its `groups`, their `tokens`, `skipped`
    refused  the service rejected a message of this peer
    """

    def __init__(self, link: Link, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{os.getpid()}-{time.time_ns()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._link = link
        self._acked = 0
        self._traced = 0
        self._received = 0
        self._taken: dict[int, tuple[str, int]] = {}

    async def send(self, message: m.Message) -> None:
        self._trace_sent(message)
        await self._link.send(message)

    async def receive(self, deadline_s: float) -> m.Message:
        message = await self._link.receive(deadline_s)
        self._trace_received(message)
        return message

    async def close(self) -> None:
        await self._link.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _trace_received(self, message: m.Message) -> None:
        # Before `acked`, which does not cover the rejected message.
        if isinstance(message, m.Rejected):
            self._write("refused", reason=message.reason)
        if message.received > self._acked:
            self._acked = message.received
            self._write("acked", number=message.received)
        if message.number not in (0, self._received + 1):
            return  # a duplicate, or out of order and retransmitted later
        self._received = max(self._received, message.number)
        match message:
            case m.GroupFinished():
                self._taken[message.lease_id] = (group_digest(message), len(message.token_ids))
            case m.BatchReady():
                groups = [self._known(lease_id)[0] for lease_id in message.lease_ids]
                self._write("taken", policy_version=message.policy_version, groups=groups)
            case _:
                pass

    def _trace_sent(self, message: m.Message) -> None:
        if 0 < message.number <= self._traced:
            return  # retransmitted
        self._traced = max(self._traced, message.number)
        match message:
            case m.GroupFinished():
                self._sent(message, "group", len(message.token_ids), group=group_digest(message))
            case m.ScreenedOut():
                self._sent(message, "screened_out", message.num_tokens)
            case m.Evaluated():
                self._sent(message, "evaluated", message.num_tokens)
            case m.LeaseFailed():
                self._sent(message, "failed", message.num_tokens, reason=message.reason)
            case m.Trained():
                taken = [self._known(lease_id) for lease_id in message.lease_ids]
                self._taken.clear()
                self._write(
                    "trained",
                    number=message.number,
                    policy_version=message.policy_version,
                    groups=[digest for digest, _ in taken],
                    tokens=sum(tokens for _, tokens in taken),
                    skipped=message.skipped,
                )
            case m.Counted():
                generated = message.counts.tokens_generated
                self._write("counted", number=message.number, generated=generated)
            case _:
                pass

    def _known(self, lease_id: int) -> tuple[str, int]:
        """Digest and tokens. A group that was never received is marked, for the trace checker."""
        return self._taken.get(lease_id, (f"{lease_id}.never-received", 0))

    def _sent(self, message: m.Counted, end: str, tokens: int, **fields: str) -> None:
        generated = message.counts.tokens_generated
        self._write(
            "sent", number=message.number, end=end, tokens=tokens, generated=generated, **fields
        )

    def _write(self, kind: str, **fields: object) -> None:
        line = json.dumps({"kind": kind, "time_s": round(time.time(), 4), **fields})
        os.write(self._file, line.encode() + b"\n")


def with_tracing(link: Link, folder: str | None, name: str) -> Link:
    """Wrap `link` to trace it to a file named `name` in `folder`; no-op without a folder."""
    return link if folder is None else TracedLink(link, Path(folder), name)
