"""Encode messages to frames and decode them: one msgpack header, then one raw frame per array.

Header: [MAGIC, PROTOCOL_VERSION, type name, {field: plain value}, [[field, dtype, [length]], ...]].
The dataclass annotations are the schema. Both ends validate every field, so the sender rejects a
wrong value. Nothing is unpickled. Arrays are little-endian and one-dimensional.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from reprlib import Repr
from typing import Any, NoReturn, cast, get_type_hints

import msgpack
import numpy as np

from speed_async.errors import ProtocolError
from speed_async.transport import fields, joining, messages, session
from speed_async.transport.fields import Plain
from speed_async.transport.messages import MAX_PROSE_CHARS, PROTOCOL_VERSION, Message, Prose
from speed_async.types import Float32Array, Int32Array

Frame = bytes | memoryview

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
_ARRAY_DTYPES: dict[object, np.dtype] = {Int32Array: np.dtype("<i4"), Float32Array: np.dtype("<f4")}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Schema:
    """The fields of one record type, grouped by encoding. Computed once."""

    record: type
    plain: tuple[tuple[str, str, fields.Check], ...]  # (field, annotation, check)
    nested: "tuple[tuple[str, _Schema], ...]"
    arrays: tuple[tuple[str, np.dtype, str, int], ...]  # (field, dtype, dtype name, itemsize)
    prose: tuple[str, ...]
    """Those of the plain fields that are bounded when they are encoded."""

    @property
    def name(self) -> str:
        return self.record.__name__


def _schema_of(record: type) -> _Schema:
    plain: list[tuple[str, str, fields.Check]] = []
    nested: list[tuple[str, _Schema]] = []
    arrays: list[tuple[str, np.dtype, str, int]] = []
    prose: list[str] = []
    hints: dict[str, object] = get_type_hints(record, include_extras=True)
    for name, hint in hints.items():
        if hint == Prose:
            prose.append(name)
            hint = str
        shown = hint.__name__ if isinstance(hint, type) else str(hint)
        if hint in _ARRAY_DTYPES:
            dtype = _ARRAY_DTYPES[hint]
            arrays.append((name, dtype, dtype.str, dtype.itemsize))
        elif isinstance(hint, type) and is_dataclass(hint):
            nested.append((name, _schema_of(hint)))
        else:
            plain.append((name, shown, fields.CHECKS[hint]))
    return _Schema(
        record=record,
        plain=tuple(plain),
        nested=tuple(nested),
        arrays=tuple(arrays),
        prose=tuple(prose),
    )


def _message_types(base: type[Message]) -> Iterator[type[Message]]:
    """Yield the leaves of the class tree that are defined in MESSAGE_MODULES.

    `Message`, `Counted` and subclasses defined elsewhere (internal to a process) are never sent.
    """
    children = base.__subclasses__()
    # `slots=True` creates each class twice; the first one exists until it is garbage collected.
    if not children and any(vars(module).get(base.__name__) is base for module in MESSAGE_MODULES):
        yield base
    for child in children:
        yield from _message_types(child)


MESSAGE_MODULES = (messages, joining, session)
"""Modules that define the messages of the protocol."""

_SCHEMAS = {record.__name__: _schema_of(record) for record in _message_types(Message)}


def encode(message: Message) -> list[Frame]:
    """Encode a message. Array frames are views: do not modify the arrays afterwards.

    Raises ProtocolError when a field does not match its annotation or a size limit is exceeded.
    """
    name = type(message).__name__
    schema = _SCHEMAS.get(name)
    if schema is None or type(message) is not schema.record:
        raise ProtocolError(f"{name} is not a message type of this protocol")
    array_frames: list[Frame] = []
    specs: list[object] = []
    for field, dtype, shown, _ in schema.arrays:
        array = _checked_array(name, field, dtype, message)
        array_frames.append(_frame_of(array, array.base))
        specs.append([field, shown, [len(array)]])
    header = pack_header([MAGIC, PROTOCOL_VERSION, name, _to_plain(schema, message), specs])
    frames: list[Frame] = [header, *array_frames]
    _check_total_size(name, frames)
    return frames


def decode(frames: Sequence[Frame]) -> Message:
    """Decode `frames`. The arrays of the message are read-only views of the frames.

    Raises only ProtocolError, for any input.
    """
    if not frames:
        raise ProtocolError("the message has no frames")
    header = unpack_header(frames[0])
    if len(header) != 5:
        raise ProtocolError(f"the header has {len(header)} elements, expected 5")
    _, _, name, values, specs = header
    schema = _SCHEMAS.get(name) if isinstance(name, str) else None
    if schema is None:
        raise ProtocolError(f"unknown message type {_shown(name)}")
    _check_total_size(schema.name, frames)
    arguments = _from_plain(schema, schema.name, values)
    arguments.update(_arrays_from(schema, specs, frames[1:]))
    return schema.record(**arguments)


def pack_header(header: list[object]) -> bytes:
    """Pack a header into one msgpack frame.

    Raises ProtocolError when the header cannot be packed or is too large.
    """
    try:
        packed = msgpack.packb(header)
    except (ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"cannot pack the header: {error}") from error
    if len(packed) > MAX_HEADER_BYTES:
        raise ProtocolError(f"the header has {len(packed)} bytes, the limit is {MAX_HEADER_BYTES}")
    return packed


def unpack_header(frame: Frame) -> list[Plain]:
    """Unpack a header frame and check its magic and protocol version.

    Raises ProtocolError. On a version mismatch the message names both versions.
    """
    if len(frame) > MAX_HEADER_BYTES:
        raise ProtocolError(f"the header has {len(frame)} bytes, the limit is {MAX_HEADER_BYTES}")
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


def _to_plain(schema: _Schema, record: object) -> dict[str, object]:
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


def _from_plain(schema: _Schema, where: str, values: Plain) -> dict[str, object]:
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


def _arrays_from(
    schema: _Schema, specs: Plain, frames: Sequence[Frame]
) -> Iterator[tuple[str, np.ndarray]]:
    if not isinstance(specs, list) or len(specs) != len(schema.arrays):
        raise ProtocolError(f"{schema.name} must declare {len(schema.arrays)} arrays")
    if len(frames) != len(schema.arrays):
        raise ProtocolError(
            f"{schema.name} has {len(frames)} array frames, expected {len(schema.arrays)}"
        )
    # `Any`: each spec has a known shape once it equals the expected one.
    for (field, dtype, shown, item_bytes), spec, frame in zip(
        schema.arrays, cast("list[Any]", specs), frames, strict=True
    ):
        num_items, rest = divmod(len(frame), item_bytes)
        if rest or spec != [field, shown, [num_items]] or type(spec[2][0]) is not int:
            raise _wrong_array(f"{schema.name}.{field}", [field, shown], item_bytes, spec, frame)
        array = np.frombuffer(frame, dtype)
        flags = array.flags
        if not flags.aligned:
            array = array.copy()
            flags = array.flags
        flags.writeable = False
        yield field, array


def _wrong_array(
    where: str, declared: list[str], item_bytes: int, spec: Plain, frame: Frame
) -> ProtocolError:
    if not isinstance(spec, list) or len(spec) != 3 or spec[:2] != declared:
        return ProtocolError(f"{where} is not a {declared[1]} array: {_shown(spec)}")
    shape = spec[2]
    if not isinstance(shape, list) or len(shape) != 1 or not fields.is_int(shape[0]):
        return ProtocolError(f"{where} is not one-dimensional: {_shown(shape)}")
    return ProtocolError(
        f"{where} declares {shape[0]} items of {item_bytes} bytes but its frame has "
        f"{len(frame)} bytes"
    )


def _checked_array(name: str, field: str, dtype: np.dtype, message: Message) -> np.ndarray:
    array: np.ndarray | Plain = getattr(message, field)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
        raise _wrong_value(name, field, f"one-dimensional {dtype.str} array", array)
    return np.ascontiguousarray(array)


def _frame_of(array: np.ndarray, base: object) -> memoryview:
    """Return the frame that the array was decoded from, if any, to forward it without a copy.

    `base` is `array.base`, which numpy declares as an array or None.
    """
    if type(base) is memoryview and base.nbytes == array.nbytes and base.format == "B":
        return base
    return array.view(np.uint8).data


def _check_total_size(name: str, frames: Sequence[Frame]) -> None:
    num_bytes = sum(map(len, frames))
    if num_bytes > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{name} has {num_bytes} bytes, the limit is {MAX_MESSAGE_BYTES}")


def _wrong_value(where: str, field: str, annotation: str, value: object) -> ProtocolError:
    return ProtocolError(f"{where}.{field} must be {annotation}, not {_shown(value)}")


def _shown(value: object) -> str:
    text = f"{type(value).__name__} {_bounded_repr.repr(value)}"
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code}")
