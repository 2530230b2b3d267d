"""Reads offline files of wandb: a log in LevelDB format of protobuf messages."""

import json
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

HEADER_BYTES = 7
"""Header size of the file and of each record fragment."""
BLOCK_BYTES = 32 * 1024
FULL, FIRST, LAST = 1, 2, 4


def history(path: Path) -> list[dict[str, object]]:
    """The rows of a `run-ID.wandb`, in order."""
    # Here, because it takes seconds in each worker that collects the tests. wandb selects one of
    # several generated modules at its import, so its messages have no static types.
    messages: Any = import_module("wandb.proto.wandb_internal_pb2")
    rows: list[dict[str, object]] = []
    for payload in _payloads(path.read_bytes()):
        record = messages.Record()
        record.ParseFromString(payload)
        if record.WhichOneof("record_type") == "history":
            rows.append({_key(item): json.loads(item.value_json) for item in record.history.item})
    return rows


def _key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def _payloads(content: bytes) -> Iterator[bytes]:
    offset, payload = HEADER_BYTES, b""
    while offset + HEADER_BYTES <= len(content):
        left = BLOCK_BYTES - offset % BLOCK_BYTES
        if left < HEADER_BYTES:  # the end of a block is padding
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", content[offset : offset + HEADER_BYTES])
        offset += HEADER_BYTES
        payload = (
            content[offset : offset + length]
            if kind in (FULL, FIRST)
            else (payload + content[offset : offset + length])
        )
        offset += length
        if kind in (FULL, LAST):
            yield payload
