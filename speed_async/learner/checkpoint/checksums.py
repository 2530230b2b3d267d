"""The checksums of a checkpoint: one file that vouches for all others, and for itself.

`SHA256SUMS` reads as `sha256sum --check` wants it; its last line, a comment to that program, is the
checksum of the lines above, so that none can go missing unseen.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from speed_async.config.whole_file import flush

CHECKSUM_FILE = "SHA256SUMS"
OWN = "# of the lines above: "


def seal(folder: Path) -> None:
    """Flush every file of `folder` to disk, then write and flush their checksums, last.

    Raises OSError.
    """
    lines = []
    for path in _files(folder):
        flush(path)
        lines.append(f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n")
    text = "".join(lines)
    sums = folder / CHECKSUM_FILE
    sums.write_text(f"{text}{OWN}{_digest_of(text)}\n", encoding="utf-8")
    flush(sums)
    flush(folder)


def damage(folder: Path) -> str:
    """What is wrong with a sealed folder, in words; empty when every byte is as it was written.

    Files that were added since do not matter.
    """
    try:
        text = (folder / CHECKSUM_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return f"{CHECKSUM_FILE} cannot be read ({error})"
    listed, mark, own = text.partition(OWN)
    if not mark or own != _digest_of(listed) + "\n":
        return f"{CHECKSUM_FILE} is not as it was written"
    for line in listed.splitlines():
        digest, _, name = line.partition("  ")
        try:
            if _digest(folder / name) != digest:
                return f"{name} is not as it was written"
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
