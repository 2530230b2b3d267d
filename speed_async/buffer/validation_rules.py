"""Validation of message payloads beyond their schema: numbers in range, tokens in the vocabulary,
no policy version from the future. Pure functions for validation.py."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import get_type_hints

from speed_async.config.schema import Config
from speed_async.errors import ProtocolError
from speed_async.transport import messages as m
from speed_async.transport.groups import GroupBounds, GroupStats, validate_group
from speed_async.transport.joining import Join
from speed_async.types import MAX_REWARD, ActorCounts

MAX_COUNT = 2**53
"""Largest count; floats represent all integers up to it."""
MAX_TEXT = m.MAX_PROSE_CHARS
"""Characters of a text; the codec shortens longer prose."""
MAX_METRICS = 1024
MAX_WEIGHT_RANKS = 4096
MAX_INDEX = 2**20
ROLES = ("actor", "learner")
DECISIONS = ("continued", "screened out", "kept", "evaluated")
_COUNTS = tuple(field.name for field in fields(ActorCounts))


class PayloadRules:
    """`vocab_size` is the exclusive upper bound of token ids; None if it is unknown."""

    def __init__(self, config: Config, vocab_size: int | None = None) -> None:
        self._max_tokens = config.actors.max_new_tokens
        self._bounds = GroupBounds(completion_tokens=self._max_tokens)
        if vocab_size is not None:
            self._bounds = replace(self._bounds, largest_token_id=vocab_size - 1)
        self._num_screening = config.gate.num_screening
        self._group_size = config.gate.group_size
        suites = config.evaluate.suites
        self._max_evaluated = max([config.evaluate.num_samples, *(s.samples for s in suites)])
        self._capacity_groups = config.capacity_groups

    def fault(self, message: m.Message, policy_version: int) -> str | None:
        """The first violation if this is the newest version; None if there is none."""
        wrong = next(self._faults(message, policy_version), None)
        return wrong and f"{type(message).__name__}: {wrong}"

    def check_group(self, message: m.GroupFinished, policy_version: int) -> GroupStats:
        """The statistics of a group. Raises ProtocolError if it is invalid while this is the
        newest version."""
        kind = type(message).__name__
        if message.num_screening != self._num_screening:
            raise ProtocolError(f"{kind}: num_screening must be {self._num_screening}")
        if len(message.lengths) != self._group_size:
            raise ProtocolError(
                f"{kind}: {len(message.lengths)} completions; a group has {self._group_size}"
            )
        if not len(message.prompt_token_ids):
            raise ProtocolError(f"{kind}: the prompt is empty")
        if policy_version != self._bounds.newest_version:
            self._bounds = replace(self._bounds, newest_version=policy_version)
        try:
            return validate_group(message, self._bounds)
        except ProtocolError as error:
            raise ProtocolError(f"{kind}: {error}") from error

    def _faults(self, message: m.Message, policy_version: int) -> Iterator[str]:
        yield from _plain_faults(message)
        if isinstance(message, m.Counted):
            yield from _count_faults(message.counts)
        match message:
            case m.GroupFinished():
                return  # `check_group` reads its contents
            case m.ScreenedOut():
                yield from _passed_faults(message)
                if message.num_completions > max(self._num_screening, self._group_size):
                    yield (
                        f"num_completions = {message.num_completions} is more than a screening has"
                    )
                yield from self._token_faults(message)
            case m.LeaseFailed():
                if message.num_completions > max(self._group_size, self._max_evaluated):
                    yield f"num_completions = {message.num_completions} is more than a lease has"
                yield from self._token_faults(message)
            case m.Evaluated():
                yield from _passed_faults(message)
                if message.num_passed + message.num_unscored > message.num_completions:
                    yield (
                        f"{message.num_passed} passed and {message.num_unscored} unscored of "
                        f"{message.num_completions} completions"
                    )
                yield from self._token_faults(message)
                if message.num_tokens and message.oldest_version > message.newest_version:
                    yield "oldest_version is above newest_version"
                if message.newest_version > policy_version:
                    yield _future("newest_version", message.newest_version, policy_version)
            case m.Sample():
                if message.decision not in DECISIONS:
                    yield f"decision {message.decision[:20]!r} is not one of {DECISIONS}"
                if not abs(message.reward) <= MAX_REWARD:
                    yield f"reward = {message.reward} is out of range"
                if message.num_tokens > self._max_tokens:
                    yield f"num_tokens = {message.num_tokens} is more than a completion has"
                if message.policy_version > policy_version:
                    yield _future("policy_version", message.policy_version, policy_version)
            case m.WeightsApplied(policy_version=applied):
                if applied > policy_version:
                    yield _future("policy_version", applied, policy_version)
            case m.ActorReport(gauges=gauges):
                yield from _metric_faults("gauges", gauges)
                if not all(map(math.isfinite, gauges.values())):
                    yield "gauges must be finite"
            case _:
                yield from self._other_faults(message)

    def _token_faults(self, message: m.LeaseEnded) -> Iterator[str]:
        if message.num_tokens > message.num_completions * self._max_tokens:
            yield (
                f"num_tokens = {message.num_tokens} is more than {message.num_completions} "
                f"completions of actors.max_new_tokens = {self._max_tokens} have"
            )

    def _other_faults(self, message: m.Message) -> Iterator[str]:
        match message:
            case m.Hello():
                if message.role not in ROLES:
                    yield f"role {message.role[:20]!r} is not one of {ROLES}"
                if message.index > MAX_INDEX:
                    yield f"index = {message.index} is above {MAX_INDEX}"
                if not 1 <= message.weight_ranks <= MAX_WEIGHT_RANKS:
                    yield f"weight_ranks must be between 1 and {MAX_WEIGHT_RANKS}"
            case Join():
                if not (message.machine and message.machine.isprintable()):
                    yield "machine is not a printable name"
                if message.rank > MAX_INDEX:
                    yield f"rank = {message.rank} is above {MAX_INDEX}"
            case m.TakeBatch(num_groups=requested):
                if not 1 <= requested <= self._capacity_groups:
                    yield f"num_groups must be between 1 and {self._capacity_groups}"
            case m.Trained():
                if len(set(message.lease_ids)) != len(message.lease_ids):
                    yield "lease_ids has duplicates"
                yield from _metric_faults("metrics", message.metrics)
            case m.PublishWeights():
                if message.store_port > 65535:
                    yield f"store_port = {message.store_port} is above 65535"
            case _:
                return


def _plain_faults(message: m.Message) -> Iterator[str]:
    """Bounds that hold for all messages: numbers are not negative, texts are not too long."""
    plain = _plain_fields(type(message))
    for name in plain.numbers:
        value = getattr(message, name)
        if not 0 <= value <= MAX_COUNT:
            may_fail = isinstance(message, m.WeightsApplied) and name == "policy_version"
            is_reward = isinstance(message, m.Sample) and name == "reward"
            if not is_reward and not (may_fail and value == -1):  # -1: it was not applied
                yield f"{name} = {value} is out of range"
    for name in plain.texts:
        if (num_chars := len(getattr(message, name))) > MAX_TEXT:
            yield f"{name} has {num_chars} characters; the maximum is {MAX_TEXT}"
    for name in plain.id_lists:
        ids = getattr(message, name)
        if ids and not 0 <= min(ids) <= max(ids) <= MAX_COUNT:
            yield f"{name} has an id that is out of range"


@dataclass(frozen=True, kw_only=True, slots=True)
class _PlainFields:
    """Names of the fields of a message type, by kind."""

    numbers: Sequence[str]
    texts: Sequence[str]
    id_lists: Sequence[str]


@cache
def _plain_fields(kind: type[m.Message]) -> _PlainFields:
    hints = get_type_hints(kind)
    return _PlainFields(
        numbers=[name for name, hint in hints.items() if hint in (int, float)],
        texts=[name for name, hint in hints.items() if hint is str],
        id_lists=[name for name, hint in hints.items() if hint == list[int]],
    )


def _count_faults(counts: ActorCounts) -> Iterator[str]:
    for name in _COUNTS:
        if not 0 <= (value := getattr(counts, name)) <= MAX_COUNT:
            yield f"counts.{name} = {value} is out of range"
    if counts.groups_in_flight > counts.groups_leased:
        yield "counts: more groups in flight than were leased"
    if counts.groups_continuing > counts.groups_in_flight:
        yield "counts: more groups continuing than in flight"
    if counts.tokens_in_flight > counts.tokens_generated:
        yield "counts: more tokens in flight than were generated"


def _passed_faults(message: m.LeaseScored) -> Iterator[str]:
    if message.num_passed > message.num_completions:
        yield f"{message.num_passed} of {message.num_completions} completions passed"
    if message.num_truncated > message.num_completions:
        yield f"{message.num_truncated} of {message.num_completions} completions truncated"
    if message.num_truncated_passed > min(message.num_truncated, message.num_passed):
        yield f"{message.num_truncated_passed} truncated completions passed, more than either"


def _metric_faults(name: str, metrics: dict[str, float]) -> Iterator[str]:
    if len(metrics) > MAX_METRICS or any(len(key) > MAX_TEXT for key in metrics):
        yield f"{name} has too many entries, or names that are too long"


def _future(name: str, version: int, policy_version: int) -> str:
    return f"{name} = {version} is from the future: the policy is at version {policy_version}"
