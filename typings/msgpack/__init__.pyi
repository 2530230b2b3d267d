"""Types of the part of msgpack that this project uses. The package has no annotations."""

from collections.abc import Callable
from typing import Any

from typing_extensions import Buffer

class UnpackException(Exception): ...

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
