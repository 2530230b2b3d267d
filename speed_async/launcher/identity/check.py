"""Whether a run that is resumed finds what it began with; a difference is refused by name."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from speed_async.buffer.durability.opened import check_segments
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

SHOWN = 8
"""Digits of a digest."""
MAX_NAMED = 3
ACCEPTED = "code-"
"""Begins the value of run.accept_scoring, so that no value reads as a number."""
PLACES = {
    DATA: "--task.path FILE",
    MODEL: "--model.path FOLDER",
    WEIGHTS: "--model.path FOLDER",
    TOKENIZER: "--model.path FOLDER",
    TEMPLATE: "--model.path FOLDER",
}


def check_identity(config: Config, folder: RunFolder) -> Identity:
    """What is there now, fit to be remembered. Changes nothing.

    Raises IdentityError when the run in `folder` began with something else, ConfigError when its
    configuration was edited, and JournalRefused when its journal is of another run or release.
    """
    then = read_identity(folder.identity)
    makers = run_ids(folder.checkpoints)
    model = Path(config.model.path)
    if then is None:
        now = _identify(config, folder, next(reversed(makers.values()), new_run_id()))
    else:
        _check_settings(then, config, folder)
        _check_checkpoints(then, makers, folder)
        now = _identify(config, folder, then.run_id)
        _check_things(then, now, config, folder)
        if WEIGHTS in then.things:
            now = with_weights(now, model, then.weights)
            _check_things(then, now, config, folder)
    fingerprint = model_fingerprint(model, chat_template=config.model.chat_template)
    check_segments(folder.journal, data=now.things[DATA].digest, model=fingerprint)
    if then is None:
        return now
    # What the run began with, where that was found today.
    places = {
        name: replace(thing, place=now.things[name].place) for name, thing in then.things.items()
    }
    return replace(then, things=places, weights=now.weights)


def _check_settings(then: Identity, config: Config, folder: RunFolder) -> None:
    missing = object()
    present = fixed_settings(config)
    for field, began in then.settings.items():
        if (value := present.get(field, missing)) != began:
            raise ConfigError(
                field,
                None if value is missing else value,
                f"this run began with {began!r}, and '{folder.config}' was edited since; set it "
                "back, or start a new run",
            )


def _check_checkpoints(then: Identity, makers: Mapping[str, str], folder: RunFolder) -> None:
    for name, maker in makers.items():
        if maker != then.run_id:
            path = folder.checkpoints / name
            raise IdentityError(
                f"checkpoint '{path}' is of another run ({maker[:SHOWN]}, this one is "
                f"{then.run_id[:SHOWN]}): move it away; to train on from it, start a new run: "
                f"speed-async train CONFIG --model.path '{path}'"
            )


def _identify(config: Config, folder: RunFolder, run_id: str) -> Identity:
    try:
        return identify(config, run_id=run_id)
    except (ConfigError, DataError, TaskError) as error:
        raise IdentityError(
            f"the data of the run in '{folder.path}' cannot be made again: {error}"
        ) from error


def _check_things(then: Identity, now: Identity, config: Config, folder: RunFolder) -> None:
    if differences := dict(_differences(then, now, config)):
        raise IdentityError(_refusal(differences, folder))


def _differences(then: Identity, now: Identity, config: Config) -> Iterator[tuple[str, str]]:
    """Names of what differs, and how."""
    for name, before in then.things.items():
        after = now.things.get(name)
        if after is None or after.digest == before.digest:
            continue
        if name == DATA:
            yield name, _other_data(before, after)
        elif name != SCORING:
            place = _places(before, after)
            yield name, f"the {name} in {place} changed: {_files(before, after)}"
        elif not _is_accepted(config.run.accept_scoring, after):
            yield name, _other_code(before, after)


def _other_code(before: IdentityPart, after: IdentityPart) -> str:
    return (
        f"the code that scores ({after.place}) changed: {_files(before, after)}; rewards before "
        "and after would not compare (to go on with the changed code, add --run.accept_scoring "
        f"{ACCEPTED}{after.digest[:SHOWN]})"
    )


def _is_accepted(value: str | None, scoring: IdentityPart) -> bool:
    digest = (value or "").removeprefix(ACCEPTED)
    return len(digest) >= SHOWN and scoring.digest.startswith(digest)


def _other_data(before: IdentityPart, after: IdentityPart) -> str:
    was, is_now = before.parts, after.parts
    if was["train"] != is_now["train"] or was["held_out"] != is_now["held_out"]:
        how = "other numbers of prompts"
    elif was["answers"] == is_now["answers"]:
        how = "the same prompts in another order"
    elif was["prompts"] == is_now["prompts"]:
        how = "the same prompts with other answers"
    else:
        how = "other prompts"
    return (
        f"the data in {_places(before, after)} changed ({how}): {_counted(before)} then, "
        f"{_counted(after)} now; recorded prompt ids would name other prompts, and held-out "
        "prompts may have been trained on"
    )


def _counted(data: IdentityPart) -> str:
    train, held_out = data.parts["train"], data.parts["held_out"]
    return f"{train} prompts and {held_out} held out (fingerprint {data.digest[:SHOWN]})"


def _places(before: IdentityPart, after: IdentityPart) -> str:
    moved = f" (it was in '{before.place}')" if before.place != after.place else ""
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


def _short(thing: IdentityPart, name: str) -> str:
    part = thing.parts.get(name)
    return str(part)[:SHOWN] if part is not None else "not there"


def _refusal(differences: Mapping[str, str], folder: RunFolder) -> str:
    texts = list(differences.values())
    said = f" {texts[0]}" if len(texts) == 1 else "".join(f"\n  {text}" for text in texts)
    places = sorted({PLACES[name] for name in differences if name in PLACES})
    moved = f" (from another place: {', '.join(places)})" if places else ""
    return (
        f"the run in '{folder.path}' cannot be resumed, and nothing in it was changed:{said}. "
        f"Bring back what it began with{moved}, or start a new run{_from_checkpoint(folder)}"
    )


def _from_checkpoint(folder: RunFolder) -> str:
    versions = kept_versions(folder.checkpoints)
    if not versions:
        return ""
    newest = checkpoint_folder(folder.checkpoints, versions[-1])
    return f" from its newest checkpoint: speed-async train CONFIG --model.path '{newest}'"
