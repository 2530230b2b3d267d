"""Serialization of the service's complete state to plain bytes and back, without pickle.

Every attribute of an object is state unless its class lists it in `CONFIGURED`: attributes that
come from the configuration or from the constructor's caller. A new field is therefore part of the
snapshot automatically. A class with `saved` and `load` defines its own compact form. Objects are
restored in place; records are created anew. Restoring never calls or imports anything that the
bytes name.
"""

import json
import sys
from collections import Counter, OrderedDict, deque
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import msgpack
import numpy as np
from pydantic import BaseModel

from speed_async.errors import JournalError

PACKAGE = "speed_async."
_CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "dict": dict,
    "ordered": OrderedDict,
    "counter": Counter,
}
_SCALARS = frozenset((bool, int, float, str, type(None)))
_TAGS = {kind: tag for tag, kind in _CONTAINERS.items()}


def capture(root: object) -> bytes:
    """Serialize `root` and everything it holds. Raises TypeError for a value that is neither state
    nor listed in CONFIGURED."""
    return msgpack.packb(_Writer().tree(root, type(root).__name__))


def restore(root: object, packed: bytes | memoryview) -> None:
    """Load the state into `root`, which was built from the same configuration as the captured one.

    Raises JournalError when the bytes do not match the object.
    """
    try:
        tree = msgpack.unpackb(packed, strict_map_key=False)
        _value(tree, root)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise JournalError(f"the journal's snapshot does not fit this release: {error}") from error


class _Writer:
    def __init__(self) -> None:
        self._seen: set[int] = set()

    def tree(self, value: object, where: str) -> object:
        if type(value) in _SCALARS:
            return value
        if tag := _TAGS.get(type(value)):
            return [tag, self._items(value, where)]
        if isinstance(value, deque):
            return ["deque", self._items(value, where), value.maxlen]
        if isinstance(value, np.ndarray):
            return ["array", value.dtype.str, list(value.shape), value.tobytes()]
        if isinstance(value, np.random.Generator):
            return ["rng", json.dumps(value.bit_generator.state)]
        if isinstance(value, Enum):
            return ["enum", *_name(type(value)), value.value]
        if not type(value).__module__.startswith(PACKAGE):
            raise TypeError(f"{where} has type {type(value).__name__}, which is not service state")
        if is_dataclass(value):
            return ["record", *_name(type(value)), self._record(value, where)]
        if id(value) in self._seen:
            return ["there"]
        self._seen.add(id(value))
        if hasattr(value, "saved"):
            return ["own", *_name(type(value)), self.tree(value.saved(), where)]  # type: ignore
        return ["object", *_name(type(value)), self._attributes(value, where)]

    def _items(self, value: Any, where: str) -> list[object]:
        if isinstance(value, set):
            value = sorted(value)
        if not isinstance(value, dict) and all(type(item) in _SCALARS for item in value):
            return list(value)
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        items = [(self.tree(k, where), self.tree(v, f"{where}[{k}]")) for k, v in pairs]
        return [list(item) for item in items] if isinstance(value, dict) else [v for _, v in items]

    def _record(self, value: Any, where: str) -> dict[str, object]:
        unsaved = getattr(type(value), "UNSAVED", ())
        return {
            field.name: self.tree(getattr(value, field.name), f"{where}.{field.name}")
            for field in fields(value)
            if field.name not in unsaved
        }

    def _attributes(self, value: object, where: str) -> dict[str, object]:
        skipped = getattr(type(value), "CONFIGURED", ())
        return {
            name: self.tree(attribute, f"{where}.{name}")
            for name, attribute in vars(value).items()
            if name not in skipped and not isinstance(attribute, BaseModel)
        }


def _value(tree: Any, current: object) -> Any:
    if not isinstance(tree, list):
        return tree
    tag, *rest = tree
    if tag in _CONTAINERS:
        return _container(tag, rest[0], current)
    match tag:
        case "deque":
            return deque((_value(item, None) for item in rest[0]), rest[1])
        case "array":
            array = np.frombuffer(rest[2], np.dtype(rest[0])).reshape(rest[1])
            return array.copy()
        case "rng":
            return _generator(json.loads(rest[0]), current)
        case "enum":
            return _type(rest[0], rest[1])(rest[2])
        case "record":
            return _record_of(_type(rest[0], rest[1]), rest[2])
        case "own":
            if type(current) is not _type(rest[0], rest[1]):
                raise TypeError(f"found a {rest[1]}, expected a {type(current).__name__}")
            current.load(_value(rest[2], None))  # type: ignore
            return current
        case "there":
            return current
        case "object":
            return _fill(_type(rest[0], rest[1]), rest[2], current)
        case _:
            raise ValueError(f"unknown tag {tag!r}")


def _container(tag: str, items: list[Any], current: object) -> object:
    kind = _CONTAINERS[tag]
    if issubclass(kind, dict):
        present = current if isinstance(current, dict) else {}
        pairs = ((_value(key, None), value) for key, value in items)
        return kind({key: _value(value, present.get(key)) for key, value in pairs})
    return kind([_value(item, None) for item in items])


def _generator(state: dict[str, Any], current: object) -> np.random.Generator:
    if not isinstance(current, np.random.Generator):
        raise TypeError("found a random generator, expected none")
    current.bit_generator.state = state  # in place: other objects share the generator
    return current


def _record_of(kind: type, values: dict[str, Any]) -> object:
    record = object.__new__(kind)
    for field in fields(kind):
        value = _value(values[field.name], None) if field.name in values else None
        object.__setattr__(record, field.name, value)
    return record


def _fill(kind: type, values: dict[str, Any], current: object) -> object:
    if type(current) is not kind:
        raise TypeError(f"found a {kind.__name__}, expected a {type(current).__name__}")
    for name, value in values.items():
        setattr(current, name, _value(value, getattr(current, name, None)))
    return current


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _type(module: str, name: str) -> type:
    """An already loaded class of this package."""
    found = getattr(sys.modules.get(module), name, None) if module.startswith(PACKAGE) else None
    if not isinstance(found, type):
        raise TypeError(f"{module}.{name} is not a class of this release")
    return found
