"""Frames that no correct peer sends: a corpus of every message type, and mutations of it."""

import math
import random
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import msgpack
import numpy as np

from speed_async.transport import following, joining, messages, session
from speed_async.transport.codec import NUMBERS, encode
from speed_async.transport.messages import Message
from speed_async.types import ActorCounts, Float32Array, Int32Array, WeightBackend

Frames = list[bytes]

EDGE_VALUES: tuple[object, ...] = (
    *(None, True, False, 0, 1, -1, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, -(2**63), 2**64 - 1),
    *(0.0, -0.0, 1e308, math.nan, math.inf, -math.inf, "", "x" * 5000, "\x00", "\ud7ff", b"raw"),
    *([], {}, [[]], {"a": []}, [0] * 5000, {str(i): i for i in range(500)}, "<i8", "|O", [-1]),
)
LEASE = b"\xa8lease_id"
"""The key of the field that `_deep` replaces, and that is below 128: its value is one byte."""
DEEP_VALUE = b"\x91" * 1000 + b"\x90"
EDGE_FLOATS = (math.nan, math.inf, -math.inf, 1.0, 1e38, -1e38)
EDGE_NUMBERS = (0, 1, -1, 2**53 + 1, 2**63 - 1, -(2**63))
EDGE_INTS = (-1, -(2**31), 2**31 - 1, 100, 65)


def corpus() -> list[Message]:
    """One valid message of every type, as a peer of the service or the service itself sends it."""
    found = []
    for module in (messages, joining, session, following):
        for kind in vars(module).values():
            is_message = isinstance(kind, type) and issubclass(kind, Message)
            if is_message and not kind.__subclasses__() and kind.__module__ == module.__name__:
                found.append(_sample(kind))
    return found


def _sample(kind: type[Any]) -> Any:
    values: dict[str, object] = {}
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        values[field.name] = _value(field.name, hint)
    return kind(**values)


def _value(name: str, hint: object) -> object:
    arrays = {"lengths": [2, 1], "cut": [0, 1], "prompt_token_ids": [5, 6]}
    texts = {"role": "actor", "kind": "training", "fingerprint": "not this one"}
    plain: dict[object, object] = {
        int: 0 if name in ("number", "received") else 1,
        float: 0.5,
        bool: False,
        str: texts.get(name, "\n"),  # unprintable: the Join of an unknown peer is refused
        list[int]: [1, 2],
        list[str]: ["actor-1.0"],
        dict[str, float]: {"time/wait_s": 0.5},
        dict[str, object]: {"a": [1, {"b": None}]},
        Float32Array: np.array([0.5, 0.5] if name == "rewards" else [-0.5] * 3, np.float32),
        Int32Array: np.array(arrays.get(name, [1, 2, 3]), np.int32),
    }
    if hint is ActorCounts:
        return ActorCounts(groups_leased=1, groups_in_flight=1)
    if isinstance(hint, type) and is_dataclass(hint):
        return _sample(hint)
    return "gloo" if hint == WeightBackend else plain[hint]


class FrameMutator:
    """Mutated frames of the corpus, deterministic for a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._valid: list[Frames] = [
            [bytes(frame) for frame in encode(message)] for message in corpus()
        ]
        self._mutations: list[Callable[[Frames], Frames]] = [
            *(self._flip, self._cut, self._splice, self._repeat, self._random_frames),
            *(self._leaf, self._leaf, self._leaf, self._array, self._unchanged, self._deep),
        ]

    def next(self) -> Frames:
        frames = list(self._random.choice(self._valid))
        for _ in range(self._random.choice((1, 1, 1, 2, 4))):
            if frames:
                frames = self._random.choice(self._mutations)(frames)
        return frames

    def _flip(self, frames: Frames) -> Frames:
        position = self._random.randrange(len(frames))
        data = bytearray(frames[position])
        for _ in range(self._random.randint(1, 8) if data else 0):
            data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
        frames[position] = bytes(data)
        return frames

    def _cut(self, frames: Frames) -> Frames:
        position = self._random.randrange(len(frames))
        data, offset = frames[position], self._random.randint(0, len(frames[position]))
        new = self._random.randbytes(self._random.randint(0, 9))
        frames[position] = data[:offset] + new + data[offset + self._random.randint(0, 9) :]
        return frames

    def _splice(self, frames: Frames) -> Frames:
        other = self._random.choice(self._valid)
        return frames[: self._random.randint(0, len(frames))] + other[1:]

    def _repeat(self, frames: Frames) -> Frames:
        return frames * self._random.choice((2, 3, 40)) if len(frames) < 100 else frames[:1]

    def _random_frames(self, frames: Frames) -> Frames:
        count = self._random.randint(0, 5)
        return [self._random.randbytes(self._random.choice((0, 1, 7, 300))) for _ in range(count)]

    def _unchanged(self, frames: Frames) -> Frames:
        return frames

    def _deep(self, frames: Frames) -> Frames:
        """Replace some field by a value nested as deep as msgpack accepts."""
        header = frames[0]
        value = header.find(LEASE) + len(LEASE)
        if value >= len(LEASE):
            frames[0] = header[:value] + DEEP_VALUE + header[value + 1 :]
        return frames

    def _leaf(self, frames: Frames) -> Frames:
        """Replace a random value of the header, which stays valid msgpack."""
        try:
            header: Any = msgpack.unpackb(frames[0][NUMBERS.size :], strict_map_key=False)
        except (ValueError, TypeError, msgpack.UnpackException):
            return frames
        node: Any = header
        while isinstance(node, list | dict) and node:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = self._random.choice(keys)
            inner = node[key]
            if not isinstance(inner, list | dict) or not inner or self._random.random() < 0.2:
                node[key] = self._random.choice(EDGE_VALUES)
                break
            node = inner
        try:
            frames[0] = self._numbers(frames[0]) + (msgpack.packb(header) or b"")
        except (ValueError, TypeError, OverflowError):
            return frames
        return frames

    def _numbers(self, header: bytes) -> bytes:
        """The numbers of this header, mostly unchanged."""
        if self._random.random() < 0.9:
            return header[: NUMBERS.size]
        return NUMBERS.pack(*(self._random.choice(EDGE_NUMBERS) for _ in range(2)))

    def _array(self, frames: Frames) -> Frames:
        """Replace a number in one of the arrays."""
        if len(frames) < 2:
            return frames
        position = self._random.randrange(1, len(frames))
        data = bytearray(frames[position])
        if len(data) >= 4:
            floats = self._random.random() < 0.5
            number = (
                np.float32(self._random.choice(EDGE_FLOATS))
                if floats
                else np.int32(self._random.choice(EDGE_INTS))
            )
            offset = 4 * self._random.randrange(len(data) // 4)
            data[offset : offset + 4] = number.tobytes()
        frames[position] = bytes(data)
        return frames
