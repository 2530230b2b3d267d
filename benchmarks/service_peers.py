"""Peers that use real sockets and messages like actors and learners do, with synthetic groups."""

import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from multiprocessing.sharedctypes import Synchronized

import msgpack
import zmq

from benchmarks.harness import GROUP_SIZE, GROUPS_A_BATCH, make_group
from benchmarks.hello import hello
from speed_async.transport import messages as m
from speed_async.transport.codec import MAX_MESSAGE_BYTES, NUMBERS, Frame, decode, encode
from speed_async.transport.curve import ClientKeys, configure_curve
from speed_async.transport.peer_names import new_identity
from speed_async.transport.session import Ack, Nack, Ping
from speed_async.transport.sockets import send_frames, set_common_options
from speed_async.transport.zeromq import QUEUED_MESSAGES
from speed_async.types import ActorCounts

BATCHES_A_CHECKPOINT = 20
"""The learner reports a durable checkpoint this often. Until then the journal keeps its groups."""
WINDOW = 48
"""Unacknowledged groups of `run_actor`."""
ACK_INTERVAL = 16
"""Unacknowledged messages received before an acknowledgement is sent."""


def client_socket(
    context: zmq.Context, port: int, name: str, keys: ClientKeys | None
) -> zmq.Socket:
    socket: zmq.Socket = context.socket(zmq.DEALER)
    socket.IDENTITY = new_identity(name)
    socket.SNDHWM = socket.RCVHWM = QUEUED_MESSAGES
    set_common_options(socket, max_frame_bytes=MAX_MESSAGE_BYTES)
    socket.LINGER = 0
    configure_curve(socket, keys)
    socket.connect(f"tcp://127.0.0.1:{port}")
    return socket


def receive_frames(socket: zmq.Socket, flags: int = 0) -> list[Frame]:
    return [frame.buffer for frame in socket.recv_multipart(flags, copy=False)]


class PackedGroup:
    """A group encoded once and sent many times, each time with another header. Peers are as light
    as bare ZeroMQ, so that only the service is measured."""

    def __init__(self, group: m.GroupFinished) -> None:
        header, self._arrays = encode(group)
        self._header = msgpack.unpackb(header[NUMBERS.size :])
        self.num_tokens = len(group.token_ids)

    def frames(self, values: dict[str, object], number: int = 0, received: int = 0) -> list[Frame]:
        magic, version, kind, before, lengths = self._header
        header = msgpack.packb([magic, version, kind, before | values, lengths])
        assert header is not None
        return [NUMBERS.pack(number, received) + header, self._arrays]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceivedGroup(m.Message):
    """A group of a batch of which only the header was decoded."""

    num_tokens: int


def _decode_header(frames: list[Frame]) -> m.Message:
    if len(frames) == 1:
        return decode(frames)
    number, received = NUMBERS.unpack_from(frames[0])
    *_, lengths = msgpack.unpackb(frames[0][NUMBERS.size :])
    return ReceivedGroup(number=number, received=received, num_tokens=lengths[5])


class Peer:
    """An actor's or learner's end of a session, on a blocking socket."""

    def __init__(self, context: zmq.Context, port: int, name: str, keys: ClientKeys | None) -> None:
        self.name = name
        self.socket = client_socket(context, port, name, keys)
        self.unacknowledged: deque[tuple[int, float]] = deque()
        """Groups sent and not acknowledged: message number and send time."""
        self.latencies_s: list[float] = []
        self.descriptor = int(self.socket.get(zmq.FD))
        self._number = 0
        self._last_received = 0
        self._acknowledged = 0

    def send(self, message: m.Message) -> None:
        send_frames(self.socket, encode(replace(message, **self._numbers())))

    def send_group(
        self, group: PackedGroup, values: dict[str, object], due_s: float | None = None
    ) -> None:
        """Send a group with packed arrays; `values` go into its header. The wait for its
        acknowledgement starts now, or at `due_s`."""
        numbers = self._numbers()
        sent_s = time.monotonic() if due_s is None else due_s
        self.unacknowledged.append((numbers["number"], sent_s))
        send_frames(self.socket, group.frames(values, **numbers))

    def _numbers(self) -> dict[str, int]:
        """Number of the next message, and of the last one received, which it acknowledges."""
        self._number += 1
        self._acknowledged = self._last_received
        return {"number": self._number, "received": self._last_received}

    def receive(self, timeout_s: float) -> m.Message | None:
        """The next message that is not the session's own. None on timeout."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            if self.socket.poll(int(1000 * left_s)) and (message := self.receive_now()):
                return message
        return None

    def receive_now(self) -> m.Message | None:
        """Like `receive`, without waiting. None when nothing is left to read."""
        while int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            message = _decode_header(receive_frames(self.socket))
            self._acknowledge(message)
            if isinstance(message, Nack | m.Rejected):
                raise RuntimeError(f"{self.name} received {message}")
            if isinstance(message, Ping):
                self._send_ack()
            elif message.number:
                self._last_received = message.number
                if self._last_received - self._acknowledged > ACK_INTERVAL:
                    self._send_ack()
            if not isinstance(message, Ack | Ping):
                return message
        return None

    def _acknowledge(self, message: m.Message) -> None:
        now_s = time.monotonic()
        while self.unacknowledged and self.unacknowledged[0][0] <= message.received:
            self.latencies_s.append(now_s - self.unacknowledged.popleft()[1])

    def _send_ack(self) -> None:
        self._acknowledged = self._last_received
        send_frames(self.socket, encode(Ack(received=self._last_received)))


class SimulatedActor:
    """Sends the same group for each lease, with at most `window` groups unacknowledged."""

    def __init__(self, peer: Peer, index: int, group: PackedGroup, window: int) -> None:
        self.peer = peer
        self.num_leases = 0
        self.num_sent = 0
        self._group = group
        self._window = window
        self._waiting: deque[tuple[int, int]] = deque()
        self._requested = 0
        self._tokens_sent = 0
        peer.send(hello("actor", index))
        self.request_prompts()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def may_send(self) -> bool:
        return self.has_work and len(self.peer.unacknowledged) < self._window

    def request_prompts(self) -> None:
        """Request prompts up to one window, including the waiting ones."""
        num_prompts = self._window - len(self._waiting)
        if num_prompts - self._requested >= max(1, self._window // 2):
            self._requested = num_prompts
            self.peer.send(m.WantWork(num_prompts=num_prompts, counts=self._counts()))

    def take(self, message: m.Message) -> None:
        if not isinstance(message, m.Leases):
            return
        self.num_leases += len(message.lease_ids)
        if message.kind == "evaluation":
            self.num_sent += len(message.lease_ids)
            self._tokens_sent += len(message.lease_ids)
            for lease_id in message.lease_ids:
                self._evaluate(lease_id)
        else:
            self._waiting.extend(zip(message.lease_ids, message.prompt_ids, strict=True))
        self._requested -= len(message.lease_ids)
        self.request_prompts()

    def send_one(self, due_s: float | None = None) -> None:
        lease_id, prompt_id = self._waiting.popleft()
        self.num_sent += 1
        self._tokens_sent += self._group.num_tokens
        counts = asdict(self._counts())
        values = {"lease_id": lease_id, "prompt_id": prompt_id, "counts": counts}
        self.peer.send_group(self._group, values, due_s)
        self.request_prompts()

    def report(self) -> None:
        """Send the heartbeat."""
        gauges = {"slots_busy": 1.0, "num_slots": 1.0, "loop_lag_s": 0.0}
        self.peer.send(m.ActorReport(gauges=gauges, counts=self._counts()))

    def _evaluate(self, lease_id: int) -> None:
        outcome = {"num_passed": 1, "num_completions": 1, "num_truncated": 0, "num_tokens": 1}
        versions = {"oldest_version": 0, "newest_version": 0}
        counts = self._counts()
        self.peer.send(m.Evaluated(lease_id=lease_id, counts=counts, **outcome, **versions))

    def _counts(self) -> ActorCounts:
        return ActorCounts(
            groups_leased=self.num_leases,
            groups_in_flight=self.num_leases - self.num_sent,
            completions_generated=GROUP_SIZE * self.num_sent,
            tokens_generated=self._tokens_sent,
        )


class SimulatedLearner:
    """Takes batches and reports them as trained, and as saved if it makes `checkpoints`."""

    def __init__(self, peer: Peer, *, checkpoints: bool) -> None:
        self.peer = peer
        self.version = 0
        self.num_groups = 0
        self.num_tokens = 0
        self._checkpoints = checkpoints
        peer.send(hello("learner", 0))
        self._take()

    def receive(self, timeout_s: float) -> None:
        message = self.peer.receive(timeout_s)
        if isinstance(message, ReceivedGroup):
            self.num_groups += 1
            self.num_tokens += message.num_tokens
        elif isinstance(message, m.BatchReady):
            self._train(message)

    def _take(self) -> None:
        self.peer.send(m.TakeBatch(policy_version=self.version, num_groups=GROUPS_A_BATCH))

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
        self.peer.send(trained)
        if self._checkpoints and self.version % BATCHES_A_CHECKPOINT == 0:
            self.peer.send(
                m.CheckpointSaved(policy_version=self.version, oldest_kept_version=self.version)
            )
        self._take()


def run_actor(port: int, tokens_each: int, keys: ClientKeys | None) -> None:
    """Send groups as fast as they are acknowledged."""
    peer = Peer(zmq.Context(), port, "actor-1.0", keys)
    actor = SimulatedActor(peer, 1, PackedGroup(make_group(tokens_each)), WINDOW)
    while True:
        while actor.may_send:
            actor.send_one()
        message = peer.receive(1.0)
        if message is not None:
            actor.take(message)


def run_learner(
    port: int, num_groups: "Synchronized[int]", keys: ClientKeys | None, checkpoints: bool
) -> None:
    """Take batches as fast as they come; `num_groups` counts their groups."""
    learner = SimulatedLearner(Peer(zmq.Context(), port, "learner", keys), checkpoints=checkpoints)
    while True:
        learner.receive(1.0)
        num_groups.value = learner.num_groups
