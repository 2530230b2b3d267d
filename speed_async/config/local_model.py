"""Finds a model on this machine: a folder, or the local copy of a model of the Hugging Face hub."""

import sys
from functools import cache
from pathlib import Path

from speed_async.config.hub_id import is_hub_id
from speed_async.errors import ConfigError, NotDownloaded

FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "*.tiktoken",
    "merges.txt",
    "vocab*",
    "spiece.model",
    "sentencepiece*.model",
]
"""Weights, settings and tokenizer; a repository may have the weights in other formats too."""


def model_folder(path: str) -> Path:
    """The folder of `model.path`. A model of the hub is downloaded, or updated, to the cache of
    huggingface_hub (HF_HUB_CACHE), once per process; without a connection, its cached copy is used.

    Raises ConfigError for a hub model that is neither in the cache nor reachable.
    """
    if not is_hub_id(path) or Path(path).is_dir():
        return Path(path)
    return _local_copy(path)


@cache
def _local_copy(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
        num_cached = _num_files(cached)
    except LocalEntryNotFoundError:
        cached, num_cached = None, 0
    try:
        folder = Path(snapshot_download(name, allow_patterns=FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise NotDownloaded("model.path", name, _remedy(name, error)) from None
    if not (folder / "config.json").is_file():
        remedy = f"its copy in {folder} has no config.json: download it again"
        raise ConfigError("model.path", name, remedy)
    is_old = folder == cached and _num_files(folder) == num_cached
    origin = "from the cache" if is_old else "downloaded"
    sys.stderr.write(f"model {name}: {folder} ({origin})\n")
    sys.stderr.flush()
    return folder


def _num_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def _remedy(name: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"no such folder ({Path(name).resolve()}), and no such model of the Hugging Face hub is in "
        f"the cache or can be downloaded ({reason}); set the path of a folder or an id such as "
        f"Qwen/Qwen2.5-Math-1.5B, or run `hf download {name}` where there is a connection"
    )
