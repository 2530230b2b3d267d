"""How a snapshot stores the values that have no plain form: arrays, random generators, messages."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PlainSerializer, PlainValidator

from speed_async.transport.codec import decode, encode
from speed_async.transport.messages import Message


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredGroup(Message):
    """Placeholder of a GroupFinished until it is sent: the group is still in the journal or in the
    buffer's memory. Never sent itself."""

    lease_id: int
    segment: int
    offset: int

    @property
    def place(self) -> tuple[int, int]:
        return (self.segment, self.offset)


def _message_to_plain(message: Message) -> object:
    return asdict(message) if isinstance(message, StoredGroup) else encode(message)


def _message_from_plain(plain: Any) -> Message:
    return StoredGroup(**plain) if isinstance(plain, dict) else decode(plain)


def _array_to_plain(array: NDArray[Any]) -> list[object]:
    return [array.dtype.str, array.tobytes()]


def _array_reader(dtype: str) -> Callable[[Any], NDArray[Any]]:
    def read(plain: Any) -> NDArray[Any]:
        found, values = plain
        if found != dtype:
            raise ValueError(f"an array of {found}, expected {dtype}")
        return np.frombuffer(values, np.dtype(dtype)).copy()

    return read


def _generator_to_plain(generator: np.random.Generator) -> str:
    return json.dumps(generator.bit_generator.state)


def _generator_from_plain(plain: Any) -> np.random.Generator:
    generator = np.random.default_rng(0)
    generator.bit_generator.state = json.loads(plain)
    return generator


_ARRAY = PlainSerializer(_array_to_plain, return_type=Any)
SavedUint8 = Annotated[NDArray[np.uint8], PlainValidator(_array_reader("|u1")), _ARRAY]
SavedInt32 = Annotated[NDArray[np.int32], PlainValidator(_array_reader("<i4")), _ARRAY]
SavedFloat32 = Annotated[NDArray[np.float32], PlainValidator(_array_reader("<f4")), _ARRAY]
SavedFloat64 = Annotated[NDArray[np.float64], PlainValidator(_array_reader("<f8")), _ARRAY]
"""One-dimensional arrays."""
SavedGenerator = Annotated[
    np.random.Generator,
    PlainValidator(_generator_from_plain),
    PlainSerializer(_generator_to_plain, return_type=Any),
]
SavedMessage = Annotated[
    Message,
    PlainValidator(_message_from_plain),
    PlainSerializer(_message_to_plain, return_type=Any),
]
