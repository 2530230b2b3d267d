"""A link whose traffic leaves a trace on disk: which groups an actor sent, which a learner trained.

For fault drills (`observe.trace`): who decides afterwards whether a group was lost, or trained
twice, counts from these lines and asks neither service nor loops. One line is one write, made
before a message leaves and after one has come, so a killed process owes nothing but its last line.
"""

import json
import os
import time
import zlib
from pathlib import Path

from speed_async.transport import messages as m
from speed_async.transport.transport import Link

Groups = m.GroupFinished | m.BatchGroup


def digest_of(group: Groups) -> str:
    """What a group is known by on both sides of the service: lease, prompt and sampled tokens."""
    crc = zlib.crc32(group.token_ids.tobytes())
    crc = zlib.crc32(group.policy_versions.tobytes(), crc)
    crc = zlib.crc32(group.rewards.tobytes(), crc)
    return f"{group.lease_id}.{group.prompt_id}.{crc:08x}"


class TracedLink:
    """A `Link` around another one. Lines, as JSON with the wall clock's `time_s`:

    sent     an actor's result of one lease: `end`, its `tokens`, the `number` of the message and
             the actor's whole count `generated`; a group has a `group` digest
    counted  any other message of an actor: `number` and `generated`
    heard    every message up to `number` has come to the service
    taken    a batch came: its `groups`, in order, and the `policy_version` that asked for it
    trained  an update: `policy_version` after it, the `groups` it took, their `tokens`, `skipped`
    refused  the service told this peer that it takes a message no more
    """

    def __init__(self, link: Link, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{os.getpid()}-{time.time_ns()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._link = link
        self._heard = 0
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
        if isinstance(message, m.Rejected):  # before its `heard`: what was refused was not taken
            self._write("refused", reason=message.reason)
        if message.heard > self._heard:
            self._heard = message.heard
            self._write("heard", number=message.heard)
        if message.number not in (0, self._received + 1):
            return  # it came before, or comes again after what is missing before it
        self._received = max(self._received, message.number)
        match message:
            case m.BatchGroup():
                self._taken[message.lease_id] = (digest_of(message), len(message.token_ids))
            case m.BatchReady():
                groups = [self._known(lease_id)[0] for lease_id in message.lease_ids]
                self._write("taken", policy_version=message.policy_version, groups=groups)
            case _:
                pass

    def _trace_sent(self, message: m.Message) -> None:
        if 0 < message.number <= self._traced:
            return  # sent again, after a connection was lost
        self._traced = max(self._traced, message.number)
        match message:
            case m.GroupFinished():
                self._sent(message, "group", len(message.token_ids), group=digest_of(message))
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
        """Digest and tokens; a group that never came is written as such, for the witness."""
        return self._taken.get(lease_id, (f"{lease_id}.never-came", 0))

    def _sent(self, message: m.Counted, end: str, tokens: int, **fields: str) -> None:
        generated = message.counts.tokens_generated
        self._write(
            "sent", number=message.number, end=end, tokens=tokens, generated=generated, **fields
        )

    def _write(self, kind: str, **fields: object) -> None:
        line = json.dumps({"kind": kind, "time_s": round(time.time(), 4), **fields})
        os.write(self._file, line.encode() + b"\n")


def with_tracing(link: Link, folder: str | None, name: str) -> Link:
    """`link`, traced to a file of this name in `folder` where there is one."""
    return link if folder is None else TracedLink(link, Path(folder), name)
