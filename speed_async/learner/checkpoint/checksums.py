"""The checksums of a checkpoint: one file that covers all other files and itself.

`SHA256SUMS` has the format of `sha256sum --check`. Its last line, a comment in that format, is the
checksum of the lines above, so that a missing line is detected.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from speed_async.config.whole_file import flush

CHECKSUM_FILE = "SHA256SUMS"
SELF_CHECKSUM = "# of the lines above: "


def seal(folder: Path) -> None:
    """Flushes every file of `folder` to disk, then writes and flushes the checksums.

    Raises OSError.
    """
    lines = []
    for path in _files(folder):
        flush(path)
        lines.append(f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n")
    text = "".join(lines)
    sums = folder / CHECKSUM_FILE
    sums.write_text(f"{text}{SELF_CHECKSUM}{_digest_of(text)}\n", encoding="utf-8")
    flush(sums)
    flush(folder)


def damage(folder: Path) -> str:
    """Human-readable description of the damage to a sealed folder; empty when it is intact.

    Files that were added later are ignored.
    """
    try:
        text = (folder / CHECKSUM_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return f"{CHECKSUM_FILE} cannot be read ({error})"
    listed, separator, own = text.partition(SELF_CHECKSUM)
    if not separator or own != _digest_of(listed) + "\n":
        return f"{CHECKSUM_FILE} does not match its checksum"
    for line in listed.splitlines():
        digest, _, name = line.partition("  ")
        try:
            if _digest(folder / name) != digest:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUM_FILE:
            yield path
        elif path.is_dir():
            flush(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
