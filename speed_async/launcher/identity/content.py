"""Content digests of files. The digest of a large file is reused while the file is unmodified."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import xxhash

MIN_CACHED_BYTES = 16 * 1024 * 1024
"""Files smaller than this are always read."""
READERS = 4
CHUNK_BYTES = 8 * 1024 * 1024
NUM_SAMPLES = 64
SAMPLE_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    digest: str
    """XXH3, 128 bits, in hex."""
    stamp: tuple[int, ...]
    """Device, inode, size, mtime and ctime (ns)."""


def digest_files(
    paths: Sequence[Path], known: Mapping[str, FileDigest] = MappingProxyType({})
) -> dict[str, FileDigest]:
    """Digests by path; several files are read concurrently. `known`: earlier digests; a large file
    with an unchanged stamp is not read. Raises OSError."""

    def digested(path: Path) -> FileDigest:
        facts = path.stat()
        stamp = (
            facts.st_dev,
            facts.st_ino,
            facts.st_size,
            facts.st_mtime_ns,
            facts.st_ctime_ns,
        )
        cached = known.get(str(path))
        if cached is not None and cached.stamp == stamp and facts.st_size >= MIN_CACHED_BYTES:
            return cached
        return FileDigest(digest=_digest(path), stamp=stamp)

    with ThreadPoolExecutor(READERS, thread_name_prefix="digest") as readers:
        return dict(zip(map(str, paths), readers.map(digested, paths), strict=True))


def digest_text(*texts: str) -> str:
    """Digest of the texts in this order; the boundaries between texts are significant."""
    digest = xxhash.xxh3_128()
    for text in texts:
        content = text.encode(errors="surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def sample_digest(path: Path) -> str:
    """Digest of a file's size, start and end, and of evenly spaced samples between: 256 KiB in all,
    cheap enough for every process to compute. Raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        last = max(0, size - SAMPLE_BYTES)
        for index in range(NUM_SAMPLES):
            file.seek(last * index // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()
