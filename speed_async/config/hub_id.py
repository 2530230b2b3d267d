"""Ids of models and data sets of the Hugging Face hub, such as `Qwen/Qwen2.5-Math-1.5B`."""

import re
from pathlib import Path

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_HUB_ID = re.compile(f"{_PART}/{_PART}")


def is_hub_id(text: str) -> bool:
    """Whether the text has the form of an id, `org/name`. So has a relative path of two parts."""
    return _HUB_ID.fullmatch(text) is not None


def local_or_hub(text: str, base: Path) -> str:
    """The absolute path of `text`, relative to `base`; `text` itself if nothing exists there and it
    has the form of an id."""
    path = (base / Path(text).expanduser()).resolve()
    return text if is_hub_id(text) and not path.exists() else str(path)
