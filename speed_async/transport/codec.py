"""Encode messages to frames and decode them: a header, and one frame with all arrays if it has any.

Header: `number` and `received`, 8 bytes each, then msgpack of [MAGIC, PROTOCOL_VERSION, type name,
{field: plain value}, [length of each array]]. Everything except the two numbers is the same on
every connection and in the journal, so the frames of a received message are reused.

The dataclass annotations are the schema (schemas.py). Both ends validate every field, so the sender
rejects a wrong value. Nothing is unpickled. Arrays are little-endian, one-dimensional and have
items of 4 bytes.
"""

import struct
from collections.abc import Sequence
from reprlib import Repr
from typing import NoReturn

import msgpack
import numpy as np

from speed_async.errors import ProtocolError
from speed_async.transport import fields
from speed_async.transport.fields import Plain
from speed_async.transport.messages import MAX_PROSE_CHARS, PROTOCOL_VERSION, Frame, Message
from speed_async.transport.schemas import SCHEMAS, Schema

MAGIC = "speed_async"
MAX_HEADER_BYTES = 1024 * 1024
MAX_MESSAGE_BYTES = 256 * 1024 * 1024
MAX_FRAMES = 64
MAX_SHOWN_CHARS = 60
"""Maximum length of an invalid value in an error message."""

_bounded_repr = Repr()
"""Bounded in depth: a plain `repr` of deeply nested untrusted input overflows the stack."""
_bounded_repr.maxlevel, _bounded_repr.maxstring, _bounded_repr.maxother = (
    2,
    MAX_SHOWN_CHARS,
    MAX_SHOWN_CHARS,
)
_INT32, _FLOAT32 = np.dtype("<i4"), np.dtype("<f4")
NUMBERS = struct.Struct("<qq")
"""`number` and `received` of a message, at the start of its header."""


def encode(message: Message) -> list[Frame]:
    """Encode a message. The frames of a decoded message are reused, with the numbers that it has.

    Raises ProtocolError when a field does not match its annotation or a size limit is exceeded.
    """
    header, *arrays = message.frames or _encode_fields(message)
    return [_pack_numbers(message) + header[NUMBERS.size :], *arrays]


def _encode_fields(message: Message) -> list[Frame]:
    """Encode a message without its numbers."""
    name = type(message).__name__
    schema = SCHEMAS.get(name)
    if schema is None or type(message) is not schema.record:
        raise ProtocolError(f"{name} is not a message type of this protocol")
    arrays = [
        _checked_array(name, field, message, is_float=is_float) for field, is_float in schema.arrays
    ]
    values, lengths = _to_plain(schema, message), [*map(len, arrays)]
    header = pack_header([MAGIC, PROTOCOL_VERSION, name, values, lengths])
    frames: list[Frame] = [bytes(NUMBERS.size) + header]
    if arrays:
        _check_total_size(name, len(frames[0]) + sum(array.nbytes for array in arrays))
        frames.append(b"".join(array.data for array in arrays))
    return frames


def _pack_numbers(message: Message) -> bytes:
    for field, value in (("number", message.number), ("received", message.received)):
        if not fields.is_int(value):
            raise _wrong_value(type(message).__name__, field, "int", value)
    return NUMBERS.pack(message.number, message.received)


def decode(frames: Sequence[Frame]) -> Message:
    """Decode `frames`. The arrays of the message are read-only views of them.

    Raises only ProtocolError, for any input.
    """
    if not frames:
        raise ProtocolError("the message has no frames")
    if len(frames[0]) < NUMBERS.size:
        raise ProtocolError(f"the header begins with {NUMBERS.size} bytes of numbers")
    if len(frames[0]) > NUMBERS.size + MAX_HEADER_BYTES:
        raise _too_large(len(frames[0]))
    first = bytes(frames[0])
    header = unpack_header(first[NUMBERS.size :])
    if len(header) != 5:
        raise ProtocolError(f"the header has {len(header)} elements, expected 5")
    _, _, name, values, lengths = header
    schema = SCHEMAS.get(name) if isinstance(name, str) else None
    if schema is None:
        raise ProtocolError(f"unknown message type {_shown(name)}")
    _check_total_size(schema.name, sum(map(len, frames)))
    arguments = _from_plain(schema, schema.name, values)
    arguments.update(_arrays_from(schema, lengths, frames[1:]))
    number, received = NUMBERS.unpack_from(first)
    message: Message = schema.record(number=number, received=received, **arguments)
    message.keep((first, *frames[1:]))
    return message


def pack_header(header: list[object]) -> bytes:
    """Pack a header into one msgpack frame.

    Raises ProtocolError when the header cannot be packed or is too large.
    """
    try:
        packed = msgpack.packb(header)
    except (ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"cannot pack the header: {error}") from error
    if len(packed) > MAX_HEADER_BYTES:
        raise _too_large(len(packed))
    return packed


def unpack_header(frame: Frame) -> list[Plain]:
    """Unpack a header frame and check its magic and protocol version.

    Raises ProtocolError. On a version mismatch the message names both versions.
    """
    if len(frame) > MAX_HEADER_BYTES:
        raise _too_large(len(frame))
    try:
        header: Plain = msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_HEADER_BYTES,
            max_array_len=MAX_HEADER_BYTES,
            max_map_len=MAX_HEADER_BYTES // 2,
            max_bin_len=0,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"the header is not valid msgpack: {_shown(error)}") from error
    if not isinstance(header, list) or len(header) < 2 or header[0] != MAGIC:
        raise ProtocolError(f"the header does not begin with {MAGIC!r}")
    if not fields.is_int(header[1]) or header[1] != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the peer uses protocol version {_shown(header[1])}, this process uses "
            f"{PROTOCOL_VERSION}: install the same release of speed_async everywhere"
        )
    return header


def _to_plain(schema: Schema, record: object) -> dict[str, object]:
    values: dict[str, object] = {}
    for field, annotation, check in schema.plain:
        value = values[field] = getattr(record, field)
        if not check(value):
            raise _wrong_value(schema.name, field, annotation, value)
    for field in schema.prose:
        values[field] = fields.truncate_middle(getattr(record, field), MAX_PROSE_CHARS)
    for field, inner in schema.nested:
        value = getattr(record, field)
        if not isinstance(value, inner.record):
            raise _wrong_value(schema.name, field, inner.name, value)
        values[field] = _to_plain(inner, value)
    return values


def _from_plain(schema: Schema, where: str, values: Plain) -> dict[str, object]:
    """Build constructor arguments from an untrusted map with exactly the fields of `schema`."""
    if not isinstance(values, dict):
        raise ProtocolError(f"{where} must be a map of fields, not {_shown(values)}")
    arguments: dict[str, object] = {}
    try:
        for field, annotation, check in schema.plain:
            value = arguments[field] = values[field]
            if not check(value):
                raise _wrong_value(where, field, annotation, value)
        for field, inner in schema.nested:
            inner_where = f"{where}.{field}"
            arguments[field] = inner.record(**_from_plain(inner, inner_where, values[field]))
    except KeyError as missing:
        raise ProtocolError(f"{where} is missing field {missing}") from None
    if len(values) != len(arguments):
        unknown = next(key for key in values if key not in arguments)
        raise ProtocolError(f"{where} has unknown field {_shown(unknown)}")
    return arguments


def _arrays_from(schema: Schema, lengths: Plain, frames: Sequence[Frame]) -> dict[str, np.ndarray]:
    """The arrays of a message by field. One frame holds them all."""
    num_arrays = len(schema.arrays)
    if not isinstance(lengths, list) or len(lengths) != num_arrays:
        raise ProtocolError(f"{schema.name} must declare the lengths of {num_arrays} arrays")
    if len(frames) != min(num_arrays, 1):
        raise ProtocolError(f"{schema.name} has {len(frames)} array frames")
    if not frames:
        return {}
    num_items, rest = divmod(len(frames[0]), _INT32.itemsize)
    if rest:
        raise ProtocolError(f"{schema.name} has an array frame of {len(frames[0])} bytes")
    integers = np.frombuffer(frames[0], _INT32)
    if not integers.flags.aligned:
        integers = integers.copy()
    integers.flags.writeable = False
    floats = integers.view(_FLOAT32)
    arrays: dict[str, np.ndarray] = {}
    start = 0
    for (field, is_float), length in zip(schema.arrays, lengths, strict=True):
        if type(length) is not int or not 0 <= length <= num_items - start:
            where = f"{schema.name}.{field}"
            raise ProtocolError(f"{where} declares {_shown(length)} of {num_items - start} items")
        arrays[field] = (floats if is_float else integers)[start : start + length]
        start += length
    if start != num_items:
        raise ProtocolError(f"{schema.name} declares {start} items but sends {num_items}")
    return arrays


def _checked_array(name: str, field: str, message: Message, *, is_float: bool) -> np.ndarray:
    array: np.ndarray | Plain = getattr(message, field)
    dtype = _FLOAT32 if is_float else _INT32
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
        raise _wrong_value(name, field, f"one-dimensional {dtype.str} array", array)
    return np.ascontiguousarray(array)


def _check_total_size(name: str, num_bytes: int) -> None:
    if num_bytes > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{name} has {num_bytes} bytes, the limit is {MAX_MESSAGE_BYTES}")


def _too_large(num_bytes: int) -> ProtocolError:
    return ProtocolError(f"the header has {num_bytes} bytes, the limit is {MAX_HEADER_BYTES}")


def _wrong_value(where: str, field: str, annotation: str, value: object) -> ProtocolError:
    return ProtocolError(f"{where}.{field} must be {annotation}, not {_shown(value)}")


def _shown(value: object) -> str:
    text = f"{type(value).__name__} {_bounded_repr.repr(value)}"
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code}")
