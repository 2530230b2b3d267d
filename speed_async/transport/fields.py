"""Validation of message fields: one check per annotation, applied on both ends.

A `bool` is not an `int`. An `int` is accepted as a `float`. A `float` field must be finite; metrics
(`dict[str, float]`, `dict[str, object]`) may contain NaN, so that a non-finite step can be
reported.
"""

import math
from collections.abc import Callable
from typing import TypeAlias, get_args

from speed_async.types import WeightBackend

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""A value of a header, as msgpack unpacks it."""
Check = Callable[[Plain], bool]

MIN_INT, MAX_INT = -(2**63), 2**63 - 1
MAX_DEPTH = 8
"""Maximum nesting of lists and maps in one metrics value."""


def is_bool(value: object) -> bool:
    return isinstance(value, bool)


def is_int(value: object) -> bool:
    return type(value) is int and MIN_INT <= value <= MAX_INT


def is_number(value: object) -> bool:
    return isinstance(value, float) or is_int(value)


def is_finite(value: object) -> bool:
    return math.isfinite(value) if isinstance(value, float) else is_int(value)


def is_str(value: object) -> bool:
    return isinstance(value, str)


def is_scalar(value: object) -> bool:
    """Whether `value` is None, bool, int, float or str: the types of a metric."""
    return value is None or isinstance(value, bool | str) or is_number(value)


def is_plain(value: Plain, depth: int = MAX_DEPTH) -> bool:
    """Whether `value` is a scalar, or lists and string-keyed maps of plain values.

    Nesting is limited to `depth`.
    """
    if is_scalar(value):
        return True
    if depth == 0:
        return False
    if isinstance(value, list):
        return all(is_plain(item, depth - 1) for item in value)
    if isinstance(value, dict):
        return all(is_str(key) and is_plain(item, depth - 1) for key, item in value.items())
    return False


def list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def map_of(check: Check) -> Check:
    return lambda value: (
        isinstance(value, dict) and all(map(is_str, value)) and all(map(check, value.values()))
    )


CHECKS: dict[object, Check] = {
    bool: is_bool,
    int: is_int,
    float: is_finite,
    str: is_str,
    WeightBackend: lambda value: value in get_args(WeightBackend),
    list[bool]: list_of(is_bool),
    list[int]: list_of(is_int),
    list[float]: list_of(is_finite),
    list[str]: list_of(is_str),
    dict[str, float]: map_of(is_number),
    dict[str, object]: map_of(lambda value: is_plain(value, MAX_DEPTH)),
}


def truncate_middle(text: str, max_chars: int) -> str:
    """`text` as valid UTF-8, with its middle removed when it exceeds `max_chars`."""
    text = text.encode("utf-8", "replace").decode()
    if len(text) <= max_chars:
        return text
    mark = f" ... ({len(text) - max_chars} or more characters omitted) ... "
    num_shown = max_chars - len(mark)
    return text[: num_shown - num_shown // 2] + mark + text[len(text) - num_shown // 2 :]
