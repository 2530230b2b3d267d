"""What an evaluation does: which models, which suites, and with which settings."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_async.config.checks.vllm import MIN_TEMPERATURE, is_raised
from speed_async.config.load import apply_overrides, parse_config
from speed_async.config.resumed import CONFIG_FILE
from speed_async.config.schema import Config
from speed_async.config.sections.evaluate import HELD_OUT, SuiteConfig
from speed_async.config.sections.sources import PROMPT_FORMAT, names_in
from speed_async.environments.matching import MatchKind
from speed_async.errors import SpeedAsyncError
from speed_async.evaluation.protocols import SPEED_PAPER, Protocol
from speed_async.launcher.evaluation.suite_names import parse_suites, suite_error

USED_SECTIONS = ("actors", "model")
"""Sections whose fields an evaluation uses, and which can be overridden."""
OUTPUT_FOLDER = "evaluation"
"""In a run folder."""
MAX_WORKERS = 8
"""Most verifier processes by default."""
_VERSION = re.compile(r"version-\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of the command; None where it was not given."""

    suites: tuple[str, ...] = ()
    engine: str | None = None
    samples: int | None = None
    temperature: float | None = None
    protocol: Protocol | None = None
    max_new_tokens: int | None = None
    format: str | None = None
    match: MatchKind | None = None
    num_prompts: int | None = None
    out: Path | None = None
    seed: int = 0
    overrides: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises SpeedAsyncError."""
        temperature = self.temperature
        if temperature is None and self.protocol is not None:
            temperature = self.protocol.temperature
        if self.format is not None:
            _check_format(self.format)
        if temperature == 0 and (self.samples or 1) > 1:
            raise SpeedAsyncError(
                f"--samples {self.samples}: at temperature 0 all samples of a prompt are equal; "
                "leave it out, or set a --temperature above 0"
            )


def _check_format(text: str) -> None:
    names = names_in(text)
    if "prompt" not in names:
        raise SpeedAsyncError(f"--format '{text}': it needs {{prompt}}, such as 'Q: {{prompt}} A:'")
    for name in names:
        if name != "prompt":
            raise SpeedAsyncError(
                f"--format '{text}': {{{name}}} is not replaced, only {{prompt}} is; leave its "
                "braces out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One model to evaluate. `config.model.path` is its folder."""

    name: str
    config: Config
    out: Path
    wants_chat_template: bool
    """Use the chat template if the tokenizer has one; False: `config.model.chat_template`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSuite:
    """A suite with its settings; its prompts are not read yet."""

    config: SuiteConfig
    format: str
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    targets: tuple[Target, ...]
    suites: tuple[PlannedSuite, ...]
    held_out_of: Config | None
    """The run whose held-out prompts are evaluated as well."""

    def check(self) -> None:
        """Raises SpeedAsyncError for a temperature that vLLM would change."""
        used = [(each.config.name, each.config.temperature) for each in self.suites]
        if self.held_out_of is not None:
            used.append((HELD_OUT, self.held_out_of.actors.temperature))
        for name, temperature in used:
            if self.targets[0].config.actors.engine == "vllm" and is_raised(temperature):
                option = "--actors.temperature" if name == HELD_OUT else "--temperature"
                raise SpeedAsyncError(
                    f"suite '{name}' at temperature {temperature:g}: vLLM samples at "
                    f"{MIN_TEMPERATURE} instead; set {option} to at least {MIN_TEMPERATURE}, or "
                    "--engine torch"
                )


def plan_model(path: str, options: Options) -> Plan:
    """Evaluate one model folder. Raises SpeedAsyncError."""
    protocol = options.protocol or SPEED_PAPER
    texts = options.suites or (protocol.suites if options.protocol else ())
    if not texts:
        raise SpeedAsyncError("name at least one --suite, or a --protocol that has some")
    suites = parse_suites(texts, {})
    if any(suite.name == HELD_OUT for suite in suites):
        raise suite_error(HELD_OUT, "only a run has held-out prompts: give its folder")
    config = _model_config(path, protocol, options)
    name = model_name(Path(config.model.path))
    out = options.out or Path("runs") / f"eval-{name}-{protocol.name}"
    target = Target(
        name=name,
        config=config,
        out=out.expanduser().resolve(),
        wants_chat_template=protocol.chat_template and not _sets_chat_template(options),
    )
    return Plan(
        targets=(target,),
        suites=tuple(_planned(suite, protocol, options) for suite in suites),
        held_out_of=None,
    )


def plan_run(folder: Path, config: Config, checkpoints: Sequence[Path], options: Options) -> Plan:
    """Evaluate `checkpoints` of a run with its settings, as far as no option changes them."""
    configured = {suite.name: suite for suite in config.evaluate.suites}
    texts = options.suites or (options.protocol.suites if options.protocol else ())
    suites = parse_suites(texts or (HELD_OUT,), configured)
    config = _overridden(config.model_dump(), options)
    root = (options.out or folder / OUTPUT_FOLDER).expanduser().resolve()
    targets = [
        Target(
            name=each.name,
            config=with_model(config, each),
            out=root / each.name,
            wants_chat_template=False,
        )
        for each in checkpoints
    ]
    protocol = options.protocol or _protocol_of_run(config)
    return Plan(
        targets=tuple(targets),
        suites=tuple(
            _planned(suite, protocol, options, is_configured=configured.get(suite.name) is suite)
            for suite in suites
            if suite.name != HELD_OUT
        ),
        held_out_of=config if any(suite.name == HELD_OUT for suite in suites) else None,
    )


def with_model(config: Config, folder: Path) -> Config:
    model = config.model.model_copy(update={"path": str(folder)})
    return config.model_copy(update={"model": model})


def model_name(folder: Path) -> str:
    """Name of a model folder; for a checkpoint of a run, `RUN-version-N`."""
    if _VERSION.fullmatch(folder.name) and (folder.parent.parent / CONFIG_FILE).is_file():
        return f"{folder.parent.parent.name}-{folder.name}"
    return folder.name


def _model_config(path: str, protocol: Protocol, options: Options) -> Config:
    tree = {
        "run": {"seed": options.seed},
        "model": {"path": path, "chat_template": protocol.chat_template},
        "task": {"name": "arithmetic"},  # not used: suites have their own prompts
        "actors": {
            "max_new_tokens": options.max_new_tokens or protocol.max_new_tokens,
            "verifier_workers": min(MAX_WORKERS, max(1, (os.cpu_count() or 1) // 4)),
        },
    }
    return _overridden(tree, options)


def _overridden(tree: dict[str, Any], options: Options) -> Config:
    for override in options.overrides:
        section = override.removeprefix("--").partition(".")[0]
        if override.startswith("--") and section not in USED_SECTIONS:
            raise SpeedAsyncError(
                f"{override}: an evaluation has no such option, and uses only the sections "
                f"{' and '.join(USED_SECTIONS)} of a configuration"
            )
    overrides = [f"--model.path={tree['model']['path']}", *options.overrides]
    if options.engine is not None:
        overrides.append(f"--actors.engine={options.engine}")
    return parse_config(apply_overrides(tree, overrides))


def _sets_chat_template(options: Options) -> bool:
    return any("chat_template" in each or "chat-template" in each for each in options.overrides)


def _protocol_of_run(config: Config) -> Protocol:
    """Sampling and prompt format of a run, for suites that it does not configure."""
    sources = config.task.all_sources if config.task.name == "dataset" else []
    return Protocol(
        name="run",
        temperature=config.actors.temperature,
        format=sources[0].format if sources else PROMPT_FORMAT,
        chat_template=config.model.chat_template,
        max_new_tokens=config.actors.max_new_tokens,
    )


def _planned(
    suite: SuiteConfig, protocol: Protocol, options: Options, *, is_configured: bool = False
) -> PlannedSuite:
    temperature, samples = options.temperature, options.samples
    if temperature is None:
        temperature = suite.temperature if is_configured else protocol.temperature
    if samples is None:
        samples = suite.samples if is_configured else protocol.num_samples(suite.name)
    changes: dict[str, object] = {
        "temperature": float(temperature),
        "samples": 1 if temperature == 0 else samples,
    }
    if options.num_prompts is not None:
        changes["num_prompts"] = options.num_prompts
    if options.match is not None:
        changes["match"] = options.match
    return PlannedSuite(
        config=suite.model_copy(update=changes),
        format=options.format or (PROMPT_FORMAT if is_configured else protocol.format),
        max_new_tokens=options.max_new_tokens or protocol.max_new_tokens,
    )
