"""The files of a model folder that define the model, the tokenizer and the chat template."""

import json
from collections.abc import Sequence
from pathlib import Path

from speed_async.config.sections.model import ModelConfig
from speed_async.launcher.identity.content import digest_files, digest_text, sample_digest

SETTINGS = ("config.json", "generation_config.json")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
EXCLUDED_WEIGHTS = frozenset({"optimizer.safetensors"})
"""Optimiser state of a checkpoint, which is not part of the model."""
TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
)
TEMPLATE = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
TOKENIZER_CONFIG = "tokenizer_config.json"
"""May contain the chat template as well."""
_TEMPLATE_KEY = "chat_template"


def model_parts(folder: Path) -> dict[str, str]:
    """Digest by file; for weights, a digest of samples. Raises OSError."""
    sampled = {path.name: sample_digest(path) for path in weight_files(folder)}
    return _digests(folder, _matching(folder, SETTINGS)) | sampled


def weight_files(folder: Path) -> list[Path]:
    return [path for path in _matching(folder, WEIGHTS) if path.name not in EXCLUDED_WEIGHTS]


def tokenizer_parts(folder: Path) -> dict[str, str]:
    """Digest by file, without the chat template. Raises OSError."""
    parts = _digests(folder, _matching(folder, TOKENIZER))
    if TOKENIZER_CONFIG in parts:
        facts = {k: v for k, v in _tokenizer_config(folder).items() if k != _TEMPLATE_KEY}
        parts[TOKENIZER_CONFIG] = digest_text(json.dumps(facts, sort_keys=True))
    return parts


def template_parts(folder: Path) -> dict[str, str]:
    """Digest by file. Raises OSError."""
    parts = _digests(folder, _matching(folder, TEMPLATE))
    if (template := _tokenizer_config(folder).get(_TEMPLATE_KEY)) is not None:
        parts[TOKENIZER_CONFIG] = digest_text(json.dumps(template, sort_keys=True))
    return parts


def model_fingerprint(folder: Path, model: ModelConfig) -> str:
    """Digest of everything that must be identical on all nodes. It covers only samples of the
    weights: it detects another model, but not a single wrong byte. `model`: its settings; the path
    is ignored. Raises OSError."""
    settings = model.model_dump_json(exclude={"path"})
    texts = [settings, *_flat(model_parts(folder)), *_flat(tokenizer_parts(folder))]
    if model.chat_template:
        texts += _flat(template_parts(folder))
    return digest_text(*texts)[:16]


def _flat(parts: dict[str, str]) -> list[str]:
    return [text for name in sorted(parts) for text in (name, parts[name])]


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def _digests(folder: Path, paths: Sequence[Path]) -> dict[str, str]:
    digests = digest_files(paths)
    return {path.relative_to(folder).as_posix(): digests[str(path)].digest for path in paths}


def _tokenizer_config(folder: Path) -> dict[str, object]:
    """Empty if the file is missing or unreadable; loading the tokenizer reports that."""
    try:
        facts = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
