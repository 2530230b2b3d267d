"""Identity of a run's inputs by content: data, model, tokenizer, chat template, scoring code.

Stored in the run folder as `identity.json`. Does not load torch.
"""

import importlib.metadata
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from speed_async import __version__
from speed_async.config.local_model import model_folder
from speed_async.config.resumed import fixed_settings
from speed_async.config.schema import Config
from speed_async.environments.registry import make_task
from speed_async.environments.rewards import reward_functions
from speed_async.environments.scoring_source import scoring_files
from speed_async.environments.suites import open_suites
from speed_async.environments.task import StoredTask, Task, data_fingerprint
from speed_async.errors import IdentityError
from speed_async.launcher.identity.content import FileDigest, digest_files, digest_text
from speed_async.launcher.identity.model_files import (
    model_parts,
    template_parts,
    tokenizer_parts,
    weight_files,
)

FORMAT = 1
DATA, MODEL, WEIGHTS, TOKENIZER, TEMPLATE, SCORING = (
    "data",
    "model",
    "model weights",
    "tokenizer",
    "chat template",
    "code that scores",
)
"""`model` covers samples of the weights, which are fast to read; `model weights` covers all of them
and is added while the run starts."""
GYM = "reasoning_gym:"
GYM_LIBRARY = "reasoning-gym"


@dataclass(frozen=True, kw_only=True, slots=True)
class IdentityPart:
    place: str
    """Its location: a path, or the name of its class or task."""
    digest: str
    parts: Mapping[str, str | int]
    """Digest by file; for data, the counts and digests that show how two data sets differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    run_id: str
    """Stored in each checkpoint of the run."""
    release: str
    """Version of this package; informational."""
    settings: Mapping[str, Any]
    """Initial values of the configuration fields that must not change."""
    things: Mapping[str, IdentityPart]
    weights: Mapping[str, FileDigest]
    """Digests of weight files by path, so that unmodified large files are not read again."""

    def text(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"


def identify(config: Config, *, run_id: str) -> Identity:
    """Identify the inputs of a run with this configuration, except for its full weights.

    Raises ConfigError, DataError or TaskError when the task cannot be created, and IdentityError
    when a file cannot be read.
    """
    task = make_task(config.task)
    folder = model_folder(config.model.path)
    try:
        things = {
            DATA: _data(config, task),
            MODEL: _part(folder, model_parts(folder)),
            TOKENIZER: _part(folder, tokenizer_parts(folder)),
            SCORING: _scoring(config, task),
        }
        if config.model.chat_template:
            things[TEMPLATE] = _part(folder, template_parts(folder))
    except OSError as error:
        raise _unreadable(error) from error
    return Identity(
        run_id=run_id,
        release=__version__,
        settings=fixed_settings(config),
        things=things,
        weights={},
    )


def with_weights(
    identity: Identity, folder: Path, known: Mapping[str, FileDigest] = MappingProxyType({})
) -> Identity:
    """Return a copy with the full weights of this model folder. `known`: earlier digests of the
    files. Raises IdentityError."""
    try:
        weights = digest_files(weight_files(folder), known)
    except OSError as error:
        raise _unreadable(error) from error
    parts = {Path(path).name: found.digest for path, found in weights.items()}
    things = {**identity.things, WEIGHTS: _part(folder, parts)}
    return replace(identity, things=things, weights=weights)


def new_run_id() -> str:
    return uuid.uuid4().hex


def read_identity(path: Path) -> Identity | None:
    """Returns None if the file does not exist. Raises IdentityError if it cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if (version := record.pop("format")) != FORMAT:
            raise ValueError(f"it has format {version}, this release reads {FORMAT}")
        things = {name: IdentityPart(**part) for name, part in record.pop("things").items()}
        weights = {
            file: FileDigest(digest=known["digest"], stamp=tuple(known["stamp"]))
            for file, known in record.pop("weights").items()
        }
        return Identity(things=things, weights=weights, **record)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise IdentityError(
            f"'{path}' cannot be read ({error}): restore it from a copy; if there is none, remove "
            "it, and the run is compared with its journal only"
        ) from None


def _unreadable(error: OSError) -> IdentityError:
    return IdentityError(f"an input of this run cannot be read: {error}")


def _data(config: Config, task: Task) -> IdentityPart:
    sources = ", ".join(source.path for source in config.task.sources)
    if isinstance(task, StoredTask):
        prompts, answers = task.content.prompts, task.content.answers
    else:
        both = [*task.train_prompts, *task.held_out_prompts]
        prompts = _unordered([(prompt.text,) for prompt in both])
        answers = _unordered([(prompt.text, prompt.answer) for prompt in both])
    suites = open_suites(config.evaluate.suites)
    return IdentityPart(
        place=config.task.path or sources or config.task.name,
        digest=data_fingerprint(task, suites),
        parts={
            "train": len(task.train_prompts),
            "held_out": len(task.held_out_prompts),
            "prompts": prompts,
            "answers": answers,
        }
        | {f"suite {name}": len(suite) for name, suite in suites.items()},
    )


def _scoring(config: Config, task: Task) -> IdentityPart:
    rewards = reward_functions(config.task.weighted_rewards)
    files = digest_files(scoring_files(task, rewards))
    parts: dict[str, str | int] = {Path(path).name: found.digest for path, found in files.items()}
    if config.task.name.startswith(GYM):
        parts[GYM_LIBRARY] = importlib.metadata.version(GYM_LIBRARY)
    kind = type(task)
    return _part(f"{kind.__module__}.{kind.__qualname__}", parts)


def _part(place: Path | str, parts: Mapping[str, str | int]) -> IdentityPart:
    texts = [text for name in sorted(parts) for text in (name, str(parts[name]))]
    return IdentityPart(place=str(place), digest=digest_text(*texts), parts=parts)


def _unordered(rows: Sequence[tuple[str, ...]]) -> str:
    return digest_text(*sorted(digest_text(*row) for row in rows))
