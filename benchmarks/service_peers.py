"""Peers that talk to the service over real sockets as actors and learners do, but make up their
groups."""

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import zmq

from speed_async.config.schema import TaskConfig
from speed_async.tasks.registry import make_task
from speed_async.tasks.task import fingerprint
from speed_async.types import ActorCounts
from speed_async.wire import messages as m
from speed_async.wire.codec import MAX_MESSAGE_BYTES, Frame, decode, encode
from speed_async.wire.sockets import ZERO_COPY_BYTES, set_common_options
from speed_async.wire.zeromq import QUEUED_MESSAGES

GROUP_SIZE = 24
GROUPS_A_BATCH = 16
BATCHES_A_CHECKPOINT = 4
"""The learner calls a checkpoint durable this often; until then the journal keeps its groups."""
PROMPT_TOKENS = 128
FOREVER = 10**9
TASK: dict[str, object] = {"name": "arithmetic", "num_prompts": 4096, "num_held_out": 1}

ACKS_BY_LEASE = hasattr(m, "Ack")
"""Before sessions, results are acknowledged one by one."""


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Z85 text; of the server the public part alone."""

    folder: Path
    server_public: bytes
    public: bytes
    secret: bytes


def set_client_options(socket: zmq.Socket, name: str, keys: Keys | None) -> None:
    socket.IDENTITY = name.encode()
    socket.SNDHWM = socket.RCVHWM = QUEUED_MESSAGES
    set_common_options(socket, max_frame_bytes=MAX_MESSAGE_BYTES)
    socket.LINGER = 0
    if keys is not None:
        socket.CURVE_SERVERKEY = keys.server_public
        socket.CURVE_PUBLICKEY, socket.CURVE_SECRETKEY = keys.public, keys.secret


def send_frames(socket: zmq.Socket, frames: Sequence[Frame], flags: int = 0) -> None:
    """As the wire does it: small frames are copied, large ones are not."""
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        more = zmq.SNDMORE if index < last else 0
        socket.send(frame, flags | more, copy=len(frame) < ZERO_COPY_BYTES)


def receive_frames(socket: zmq.Socket, flags: int = 0) -> list[Frame]:
    return [frame.buffer for frame in socket.recv_multipart(flags, copy=False)]


class Peer:
    """An actor's or learner's end of a conversation, on a socket that blocks."""

    def __init__(self, context: zmq.Context, port: int, name: str, keys: Keys | None) -> None:
        self.name = name
        self.socket: zmq.Socket = context.socket(zmq.DEALER)
        set_client_options(self.socket, name, keys)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.unheard: deque[tuple[int, float]] = deque()
        """Groups sent and not acknowledged: number of the message, and when it was sent."""
        self.latencies_s: list[float] = []
        self._number = 0
        self._heard = 0
        self._told = 0

    def say(self, message: m.Message, *, awaited: bool = False) -> None:
        self._number += 1
        self._told = self._heard
        if awaited:
            self.unheard.append((self._number, time.perf_counter()))
        numbered = replace(message, number=self._number, heard=self._heard)
        send_frames(self.socket, encode(numbered))

    def hear(self, timeout_s: float) -> m.Message | None:
        """The next message that is not the session's own; None when there is none in time."""
        ends_s = time.perf_counter() + timeout_s
        while True:
            left_ms = max(0, int(1000 * (ends_s - time.perf_counter())))
            if not self.socket.poll(left_ms):
                return None
            message = decode(receive_frames(self.socket))
            self._acknowledge(message)
            kind = type(message).__name__
            if kind in ("Missing", "Rejected") and not ACKS_BY_LEASE:
                raise RuntimeError(f"{self.name} was told {message}")
            if kind == "Probe":
                self._send_heard()
            elif message.number:
                self._heard = message.number
                if self._heard - self._told > 16:
                    self._send_heard()
            if kind not in ("Heard", "Probe", "Ack"):
                return message

    def close(self) -> None:
        self.socket.close(linger=0)

    def _acknowledge(self, message: m.Message) -> None:
        now_s = time.perf_counter()
        if ACKS_BY_LEASE and self.unheard and type(message).__name__ == "Ack":
            self.latencies_s.append(now_s - self.unheard.popleft()[1])
        while self.unheard and self.unheard[0][0] <= message.heard:
            self.latencies_s.append(now_s - self.unheard.popleft()[1])

    def _send_heard(self) -> None:
        from speed_async.wire.session import Heard

        self._told = self._heard
        send_frames(self.socket, encode(Heard(heard=self._heard)))


class SimulatedActor:
    """Takes leases and answers each with the same made-up group, at most `window` of them
    unacknowledged. `make` sends as many as it may."""

    def __init__(self, peer: Peer, index: int, group: m.GroupFinished, window: int) -> None:
        self.peer = peer
        self.num_leases = 0
        self.num_sent = 0
        self._group = group
        self._window = window
        self._waiting: deque[tuple[int, int]] = deque()
        self._wanted = 0
        self._tokens_sent = 0
        peer.say(hello("actor", index))
        self.want()

    @property
    def may_send(self) -> bool:
        return bool(self._waiting) and len(self.peer.unheard) < self._window

    def want(self) -> None:
        """Ask for a window's worth of prompts beyond those that wait."""
        self._wanted = max(0, self._window - len(self._waiting))
        self.peer.say(m.WantWork(num_prompts=self._wanted, counts=self._counts()))

    def take(self, message: m.Message) -> None:
        if not isinstance(message, m.Leases):
            return
        self.num_leases += len(message.lease_ids)
        if message.kind == "evaluation":
            for _ in message.lease_ids:
                self.num_sent += 1
            self._tokens_sent += len(message.lease_ids)
            for lease_id in message.lease_ids:
                self.peer.say(evaluated(lease_id, self._counts()))
        else:
            self._waiting.extend(zip(message.lease_ids, message.prompt_ids, strict=True))
        self._wanted -= len(message.lease_ids)
        if self._wanted <= self._window // 2:
            self.want()

    def send_one(self) -> None:
        lease_id, prompt_id = self._waiting.popleft()
        self.num_sent += 1
        self._tokens_sent += len(self._group.token_ids)
        group = replace(self._group, lease_id=lease_id, prompt_id=prompt_id, counts=self._counts())
        self.peer.say(group, awaited=True)
        if self._wanted + len(self._waiting) < self._window // 2:
            self.want()

    def report(self) -> None:
        """The heartbeat."""
        gauges = {"slots_busy": 1.0, "num_slots": 1.0, "loop_lag_s": 0.0}
        self.peer.say(m.ActorReport(gauges=gauges, counts=self._counts()))

    def _counts(self) -> ActorCounts:
        return ActorCounts(
            groups_leased=self.num_leases,
            groups_in_flight=self.num_leases - self.num_sent,
            completions_generated=GROUP_SIZE * self.num_sent,
            tokens_generated=self._tokens_sent,
        )


class SimulatedLearner:
    """Takes batches and says that it trained on them."""

    def __init__(self, peer: Peer, *, journals: bool) -> None:
        self.peer = peer
        self.version = 0
        self.num_groups = 0
        self.num_tokens = 0
        self._journals = journals
        peer.say(hello("learner", 0))
        self._take()

    def hear(self, timeout_s: float) -> None:
        message = self.peer.hear(timeout_s)
        if isinstance(message, m.BatchGroup):
            self.num_groups += 1
            self.num_tokens += len(message.token_ids)
        elif isinstance(message, m.BatchReady):
            self._train(message)

    def _take(self) -> None:
        self.peer.say(m.TakeBatch(policy_version=self.version, num_groups=GROUPS_A_BATCH))

    def _train(self, ready: m.BatchReady) -> None:
        self.version += 1
        trained = m.Trained(
            policy_version=self.version,
            lease_ids=ready.lease_ids,
            skipped=False,
            groups_trained=self.num_groups,
            completions_trained=GROUP_SIZE * self.num_groups,
            tokens_trained=self.num_tokens,
            metrics={"loss": 0.0, "grad_norm": 0.0},
        )
        self.peer.say(trained)
        if self._journals and self.version % BATCHES_A_CHECKPOINT == 0:
            self.peer.say(
                m.CheckpointSaved(policy_version=self.version, oldest_kept_version=self.version)
            )
        self._take()


def hello(role: str, index: int) -> m.Hello:
    return m.Hello(
        role=role,
        index=index,
        incarnation=0,
        fingerprint=task_fingerprint(),
        process_id=os.getpid(),
    )


@cache
def task_fingerprint() -> str:
    return fingerprint(make_task(TaskConfig.model_validate(TASK)))


def evaluated(lease_id: int, counts: ActorCounts) -> m.Evaluated:
    return m.Evaluated(
        lease_id=lease_id,
        num_passed=1,
        num_completions=1,
        num_tokens=1,
        oldest_version=0,
        newest_version=0,
        counts=counts,
    )


def make_group(tokens_each: int, group_size: int = GROUP_SIZE) -> m.GroupFinished:
    """A group whose first half passed."""
    total = tokens_each * group_size
    rng = np.random.default_rng(0)
    return m.GroupFinished(
        counts=ActorCounts(),
        lease_id=0,
        prompt_id=0,
        num_screening=0,
        prompt_token_ids=rng.integers(0, 256, PROMPT_TOKENS).astype(np.int32),
        lengths=np.full(group_size, tokens_each, np.int32),
        rewards=(np.arange(group_size) < group_size // 2).astype(np.float32),
        cut=np.zeros(group_size, np.int32),
        token_ids=rng.integers(0, 256, total).astype(np.int32),
        logprobs=-rng.random(total).astype(np.float32),
        policy_versions=np.zeros(total, np.int32),
    )
