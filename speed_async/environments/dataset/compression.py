"""Opens compressed files, recognised by their first bytes."""

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import BinaryIO, Literal, cast

Compression = Literal["gzip", "bzip2", "xz", "zstd"]
_STARTS: dict[Compression, bytes] = {
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
    "zstd": b"\x28\xb5\x2f\xfd",
}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What opening and reading a damaged file raises."""


def compression_of(path: Path) -> Compression | None:
    """How a file is compressed; None when it is not. Raises OSError."""
    with path.open("rb") as file:
        start = file.read(6)
    return next((name for name, prefix in _STARTS.items() if start.startswith(prefix)), None)


def open_decompressed(path: Path) -> BinaryIO:
    """The content of a file, decompressed when it is compressed. Raises OSError."""
    match compression_of(path):
        case "gzip":
            return cast(BinaryIO, gzip.open(path))
        case "bzip2":
            return cast(BinaryIO, bz2.open(path))
        case "xz":
            return cast(BinaryIO, lzma.open(path))
        case "zstd":
            import pyarrow as pa

            stream = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
            return cast(BinaryIO, io.BufferedReader(stream))
        case None:
            return path.open("rb")
