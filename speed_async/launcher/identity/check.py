"""Compares a resumed run's inputs with those it started with; every difference is an error."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from speed_async.buffer.durability.recovery import check_segments
from speed_async.config.local_model import model_folder
from speed_async.config.resumed import fixed_settings
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, DataError, IdentityError, TaskError
from speed_async.launcher.identity.identity import (
    DATA,
    MODEL,
    SCORING,
    TEMPLATE,
    TOKENIZER,
    WEIGHTS,
    Identity,
    IdentityPart,
    identify,
    new_run_id,
    read_identity,
    with_weights,
)
from speed_async.launcher.identity.model_files import model_fingerprint
from speed_async.launcher.run_folder import RunFolder
from speed_async.learner.checkpoint.store import checkpoint_folder, kept_versions, run_ids

SHOWN_DIGITS = 8
"""Hex digits of a digest in messages."""
MAX_NAMED = 3
ACCEPTED = "code-"
"""Prefix of the value of run.accept_scoring, so that it is never parsed as a number."""
PATH_OPTIONS = {
    DATA: "--task.path FILE",
    MODEL: "--model.path FOLDER",
    WEIGHTS: "--model.path FOLDER",
    TOKENIZER: "--model.path FOLDER",
    TEMPLATE: "--model.path FOLDER",
}


def check_identity(config: Config, folder: RunFolder) -> Identity:
    """Return the current identity of the run's inputs, to be saved. Changes nothing.

    Raises IdentityError when the run in `folder` started with other inputs, ConfigError when its
    configuration was edited, and JournalRefused when its journal belongs to another run or release.
    """
    then = read_identity(folder.identity)
    owners = run_ids(folder.checkpoints)
    model = model_folder(config.model.path)
    if then is None:
        now = _identify(config, folder, next(reversed(owners.values()), new_run_id()))
    else:
        _check_settings(then, config, folder)
        _check_checkpoints(then, owners, folder)
        now = _identify(config, folder, then.run_id)
        _check_inputs(then, now, config, folder)
        if WEIGHTS in then.things:
            now = with_weights(now, model, then.weights)
            _check_inputs(then, now, config, folder)
    fingerprint = model_fingerprint(model, config.model)
    check_segments(folder.journal, data=now.things[DATA].digest, model=fingerprint)
    if then is None:
        return now
    # The initial digests with the current locations.
    relocated = {
        name: replace(part, place=now.things[name].place) for name, part in then.things.items()
    }
    return replace(then, things=relocated, weights=now.weights)


def _check_settings(then: Identity, config: Config, folder: RunFolder) -> None:
    missing = object()
    present = fixed_settings(config)
    for field, initial in then.settings.items():
        if (value := present.get(field, missing)) != initial:
            raise ConfigError(
                field,
                None if value is missing else value,
                f"this run started with {initial!r}, and '{folder.config}' was edited since; "
                "restore the value, or start a new run",
            )


def _check_checkpoints(then: Identity, owners: Mapping[str, str], folder: RunFolder) -> None:
    for name, owner in owners.items():
        if owner != then.run_id:
            path = folder.checkpoints / name
            raise IdentityError(
                f"checkpoint '{path}' belongs to another run ({owner[:SHOWN_DIGITS]}, this one is "
                f"{then.run_id[:SHOWN_DIGITS]}): move it away; to continue training from it, start "
                f"a new run: speed-async train CONFIG --model.path '{path}'"
            )


def _identify(config: Config, folder: RunFolder, run_id: str) -> Identity:
    try:
        return identify(config, run_id=run_id)
    except (ConfigError, DataError, TaskError) as error:
        raise IdentityError(
            f"the data of the run in '{folder.path}' cannot be loaded again: {error}"
        ) from error


def _check_inputs(then: Identity, now: Identity, config: Config, folder: RunFolder) -> None:
    if differences := dict(_differences(then, now, config)):
        raise IdentityError(_refusal(differences, folder))


def _differences(then: Identity, now: Identity, config: Config) -> Iterator[tuple[str, str]]:
    """Yield the name and the description of each difference."""
    for name, before in then.things.items():
        after = now.things.get(name)
        if after is None or after.digest == before.digest:
            continue
        if name == DATA:
            yield name, _other_data(before, after)
        elif name != SCORING:
            path = _location(before, after)
            yield name, f"the {name} in {path} changed: {_files(before, after)}"
        elif not _is_accepted(config.run.accept_scoring, after):
            yield name, _other_code(before, after)


def _other_code(before: IdentityPart, after: IdentityPart) -> str:
    return (
        f"the scoring code ({after.place}) changed: {_files(before, after)}; rewards before and "
        "after would not be comparable (to continue with the changed code, add "
        f"--run.accept_scoring {ACCEPTED}{after.digest[:SHOWN_DIGITS]})"
    )


def _is_accepted(value: str | None, scoring: IdentityPart) -> bool:
    digest = (value or "").removeprefix(ACCEPTED)
    return len(digest) >= SHOWN_DIGITS and scoring.digest.startswith(digest)


def _other_data(before: IdentityPart, after: IdentityPart) -> str:
    old, new = before.parts, after.parts
    if old["train"] != new["train"] or old["held_out"] != new["held_out"]:
        how = "different numbers of prompts"
    elif old["answers"] == new["answers"]:
        how = "the same prompts in a different order"
    elif old["prompts"] == new["prompts"]:
        how = "the same prompts with different answers"
    else:
        how = "different prompts"
    return (
        f"the data in {_location(before, after)} changed ({how}): {_counted(before)} before, "
        f"{_counted(after)} now; recorded prompt ids would refer to other prompts, and held-out "
        "prompts may have been trained on"
    )


def _counted(data: IdentityPart) -> str:
    train, held_out = data.parts["train"], data.parts["held_out"]
    return f"{train} prompts and {held_out} held out (fingerprint {data.digest[:SHOWN_DIGITS]})"


def _location(before: IdentityPart, after: IdentityPart) -> str:
    moved = f" (previously in '{before.place}')" if before.place != after.place else ""
    return f"'{after.place}'{moved}"


def _files(before: IdentityPart, after: IdentityPart) -> str:
    names = sorted(before.parts.keys() | after.parts.keys())
    changed = [name for name in names if before.parts.get(name) != after.parts.get(name)]
    listed = [
        f"{name} was {_short(before, name)}, is {_short(after, name)}"
        for name in changed[:MAX_NAMED]
    ]
    more = len(changed) - MAX_NAMED
    return "; ".join([*listed, *([f"and {more} more"] if more > 0 else [])])


def _short(part: IdentityPart, name: str) -> str:
    digest = part.parts.get(name)
    return str(digest)[:SHOWN_DIGITS] if digest is not None else "missing"


def _refusal(differences: Mapping[str, str], folder: RunFolder) -> str:
    texts = list(differences.values())
    listed = f" {texts[0]}" if len(texts) == 1 else "".join(f"\n  {text}" for text in texts)
    options = sorted({PATH_OPTIONS[name] for name in differences if name in PATH_OPTIONS})
    moved = f" (if they were moved: {', '.join(options)})" if options else ""
    return (
        f"the run in '{folder.path}' cannot be resumed, and was left unchanged:{listed}. "
        f"Restore its original inputs{moved}, or start a new run{_from_checkpoint(folder)}"
    )


def _from_checkpoint(folder: RunFolder) -> str:
    versions = kept_versions(folder.checkpoints)
    if not versions:
        return ""
    newest = checkpoint_folder(folder.checkpoints, versions[-1])
    return f" from its newest checkpoint: speed-async train CONFIG --model.path '{newest}'"
