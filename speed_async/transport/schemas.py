"""The schemas of all messages, from their dataclass annotations."""

from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as fields_of
from typing import get_type_hints

from speed_async.transport import fields, following, joining, messages, session
from speed_async.transport.messages import Message, Prose
from speed_async.types import Float32Array, Int32Array

_SESSION_FIELDS = frozenset(field.name for field in fields_of(Message))


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """The fields of one record type, grouped by encoding. Computed once."""

    record: type
    plain: tuple[tuple[str, str, fields.Check], ...]  # (field, annotation, check)
    nested: "tuple[tuple[str, Schema], ...]"
    arrays: tuple[tuple[str, bool], ...]  # (field, whether its items are floats)
    prose: tuple[str, ...]
    """Those of the plain fields that are bounded when they are encoded."""

    @property
    def name(self) -> str:
        return self.record.__name__


def _schema_of(record: type) -> Schema:
    plain: list[tuple[str, str, fields.Check]] = []
    nested: list[tuple[str, Schema]] = []
    arrays: list[tuple[str, bool]] = []
    prose: list[str] = []
    hints: dict[str, object] = get_type_hints(record, include_extras=True)
    for name, hint in hints.items():
        if issubclass(record, Message) and name in _SESSION_FIELDS:
            continue
        if hint == Prose:
            prose.append(name)
            hint = str
        shown = hint.__name__ if isinstance(hint, type) else str(hint)
        if hint in (Int32Array, Float32Array):
            arrays.append((name, hint == Float32Array))
        elif isinstance(hint, type) and is_dataclass(hint):
            nested.append((name, _schema_of(hint)))
        else:
            plain.append((name, shown, fields.CHECKS[hint]))
    return Schema(
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


MESSAGE_MODULES = (messages, joining, following, session)
"""Modules that define the messages of the protocol."""

SCHEMAS = {record.__name__: _schema_of(record) for record in _message_types(Message)}
