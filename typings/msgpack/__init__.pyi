"""Types of the part of msgpack that this project uses. The package has no annotations."""

from collections.abc import Callable
from typing import Any, NamedTuple

from typing_extensions import Buffer

class UnpackException(Exception): ...

class ExtType(NamedTuple):
    code: int
    data: bytes

class Timestamp:
    def __init__(self, seconds: int, nanoseconds: int = 0) -> None: ...

def packb(o: object, *, default: Callable[[Any], object] | None = None) -> bytes: ...
def unpackb(
    packed: Buffer,
    *,
    raw: bool = False,
    strict_map_key: bool = True,
    max_str_len: int = -1,
    max_array_len: int = -1,
    max_map_len: int = -1,
    max_bin_len: int = -1,
    max_ext_len: int = -1,
    ext_hook: Callable[[int, bytes], object] = ...,
) -> Any: ...
