"""The service's state as bytes, and back: msgpack of the fields of the state classes by name.

Restoring never calls or imports anything that the bytes name. Values without a plain form are in
encoding.py. Raise SNAPSHOT_VERSION with every change of a state class or of its meaning.
"""

from collections import deque
from functools import cache
from typing import Any, TypeVar

import msgpack
from pydantic import TypeAdapter, ValidationError

from speed_async.errors import JournalError, ProtocolError

SNAPSHOT_VERSION = 5
State = TypeVar("State")


def capture(state: object) -> bytes:
    """Serialize a state (buffer/state.py). Groups in the journal are saved without their arrays."""
    return msgpack.packb(_adapter(type(state)).dump_python(state), default=_to_list)


def restore(kind: type[State], packed: bytes | memoryview) -> State:
    """The state of this class that `capture` serialized. Raises JournalError if it is the state of
    another release."""
    try:
        saved = msgpack.unpackb(packed, strict_map_key=False)
        state = _adapter(kind).validate_python(saved)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise _not_fitting(f"{field}: {first['msg']}") from error
    except (ValueError, TypeError, KeyError, ProtocolError) as error:
        raise _not_fitting(str(error)) from error
    # Neither unknown fields nor missing ones with a default are errors to the validator.
    current = msgpack.unpackb(capture(state), strict_map_key=False)
    if field := _differing_field(saved, current):
        raise _not_fitting(f"only one of them has {field}")
    return state


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _to_list(value: object) -> list[object]:
    """A list of a value that msgpack cannot pack."""
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, deque):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not service state")


def _differing_field(saved: object, current: object, name: str = "") -> str:
    """The first field that only one of two states has; empty if there is none."""
    if isinstance(saved, dict) and isinstance(current, dict):
        if differing := saved.keys() ^ current.keys():
            return f"{name}{min(map(str, differing))}"
        pairs = ((saved[key], current[key], f"{name}{key}.") for key in saved)
    elif isinstance(saved, list) and isinstance(current, list):
        pairs = ((one, other, name) for one, other in zip(saved, current, strict=True))
    else:
        return ""
    return next(filter(None, (_differing_field(*pair) for pair in pairs)), "")


def _not_fitting(what: str) -> JournalError:
    return JournalError(f"the journal's snapshot does not fit this release: {what}")
