"""Peers that talk to the service over real sockets as actors and learners do, but make up their
groups."""

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import msgpack
import numpy as np
import zmq

from speed_async.config.schema import TaskConfig
from speed_async.tasks.registry import make_task
from speed_async.tasks.task import fingerprint
from speed_async.types import ActorCounts
from speed_async.wire import messages as m
from speed_async.wire.codec import MAX_MESSAGE_BYTES, Frame, decode, encode
from speed_async.wire.session import Heard, Missing, Probe
from speed_async.wire.sockets import ZERO_COPY_BYTES, set_common_options
from speed_async.wire.zeromq import QUEUED_MESSAGES

GROUP_SIZE = 24
GROUPS_A_BATCH = 16
BATCHES_A_CHECKPOINT = 20
"""The learner calls a checkpoint durable this often; until then the journal keeps its groups."""
PROMPT_TOKENS = 128
TELL_AFTER = 16
"""Messages that may come before the service is told that they came."""
FOREVER = 10**9
TASK: dict[str, object] = {"name": "arithmetic", "num_prompts": 4096, "num_held_out": 1}


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


class PackedGroup:
    """A group ready to be sent many times, each time under another header. Peers are as light as
    bare ZeroMQ's, so that what is measured is the service."""

    def __init__(self, group: m.GroupFinished) -> None:
        header, *self._arrays = encode(group)
        self._header = msgpack.unpackb(header)
        self.num_tokens = len(group.token_ids)

    def frames(self, values: dict[str, object]) -> list[Frame]:
        magic, version, kind, before, specs = self._header
        header = msgpack.packb([magic, version, kind, before | values, specs])
        assert header is not None
        return [header, *self._arrays]


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenGroup(m.Message):
    """A group of a batch of which only the header was read."""

    lease_id: int
    num_tokens: int


def _opened(frames: list[Frame]) -> m.Message:
    if len(frames) < 8:
        return decode(frames)
    _, _, _, values, _ = msgpack.unpackb(frames[0])
    return SeenGroup(
        number=values["number"],
        heard=values["heard"],
        lease_id=values["lease_id"],
        num_tokens=len(frames[5]) // 4,
    )


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

    def say(self, message: m.Message) -> None:
        number, heard = self._next_number()
        send_frames(self.socket, encode(replace(message, number=number, heard=heard)))

    def say_group(self, group: "PackedGroup", values: dict[str, object]) -> None:
        """A group whose arrays are packed already; `values` go into its header."""
        number, heard = self._next_number()
        self.unheard.append((number, time.perf_counter()))
        send_frames(self.socket, group.frames(values | {"number": number, "heard": heard}))

    def _next_number(self) -> tuple[int, int]:
        self._number += 1
        self._told = self._heard
        return self._number, self._heard

    def hear(self, timeout_s: float) -> m.Message | None:
        """The next message that is not the session's own; None when there is none in time."""
        ends_s = time.perf_counter() + timeout_s
        while True:
            left_ms = max(0, int(1000 * (ends_s - time.perf_counter())))
            if not self.socket.poll(left_ms):
                return None
            message = _opened(receive_frames(self.socket))
            self._acknowledge(message)
            if isinstance(message, Missing | m.Rejected):
                raise RuntimeError(f"{self.name} was told {message}")
            if isinstance(message, Probe):
                self._send_heard()
            elif message.number:
                self._heard = message.number
                if self._heard - self._told > TELL_AFTER:
                    self._send_heard()
            if not isinstance(message, Heard | Probe):
                return message

    def close(self) -> None:
        self.socket.close(linger=0)

    def _acknowledge(self, message: m.Message) -> None:
        now_s = time.perf_counter()
        while self.unheard and self.unheard[0][0] <= message.heard:
            self.latencies_s.append(now_s - self.unheard.popleft()[1])

    def _send_heard(self) -> None:
        self._told = self._heard
        send_frames(self.socket, encode(Heard(heard=self._heard)))


class SimulatedActor:
    """Takes leases and answers each with the same made-up group, at most `window` of them
    unacknowledged. `make` sends as many as it may."""

    def __init__(self, peer: Peer, index: int, group: PackedGroup, window: int) -> None:
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
        self._tokens_sent += self._group.num_tokens
        counts = asdict(self._counts())
        values = {"lease_id": lease_id, "prompt_id": prompt_id, "counts": counts}
        self.peer.say_group(self._group, values)
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
        if isinstance(message, SeenGroup):
            self.num_groups += 1
            self.num_tokens += message.num_tokens
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


def make_group(tokens_each: int, group_size: int = GROUP_SIZE) -> PackedGroup:
    """A group whose first half passed."""
    total = tokens_each * group_size
    rng = np.random.default_rng(0)
    group = m.GroupFinished(
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
    return PackedGroup(group)
