"""The ledger: every group and every token ends exactly once, and the ledger balances.

Each role counts independently. Engines count the tokens that they sample, actors count the groups
and tokens in flight, the service counts what it receives, and the learner counts what it trains.
`checks` compares these counts.
"""

from dataclasses import dataclass, field

from speed_async.types import ActorCounts, GroupEnd

BEFORE_TRUNCATION = "before-the-cut"
"""Account of work that only the learner reports, because the journal was truncated."""

MAX_KINDS, MAX_KIND_CHARS, MAX_EXAMPLE_CHARS = 64, 100, 500
"""Bounds on the distinct kinds of failure and their texts, which the actors write."""


def failure_kind(reason: str) -> str:
    """The part of a reason before its first colon."""
    return reason.split(":", 1)[0][:MAX_KIND_CHARS]


ENGINE_TIMES = ("sampling_s", "updating_s", "uptime_s")
"""Cumulative gauges of an actor's engine."""


@dataclass(slots=True)
class Tally:
    """Number of groups and of generated tokens with the same outcome."""

    groups: int = 0
    tokens: int = 0

    def add(self, tokens: int, groups: int = 1) -> None:
        self.groups += groups
        self.tokens += tokens


@dataclass(slots=True)
class ActorAccount:
    """The service's counts of one actor, and the counts that this actor last reported."""

    leases_granted: int = 0
    leases_ended: int = 0
    tokens_reported: int = 0
    last_counts: ActorCounts = field(default_factory=ActorCounts)
    engine_times_s: dict[str, int | float] = field(default_factory=dict)
    """ENGINE_TIMES of its last report."""
    verifier_sums: dict[str, float] = field(default_factory=dict)
    """Running sums of the outcomes of its verifier, of its last report."""
    lost: bool = False

    @property
    def balanced(self) -> bool:
        """Whether the actor's counts match what the service received from it."""
        counts = self.last_counts
        return (
            counts.tokens_generated == self.tokens_reported + counts.tokens_in_flight
            and counts.groups_leased == self.leases_ended + counts.groups_in_flight
        )


@dataclass(kw_only=True, slots=True)
class Ledger:
    ends: dict[GroupEnd, Tally] = field(default_factory=lambda: {end: Tally() for end in GroupEnd})
    evaluation: Tally = field(default_factory=Tally)
    buffered: Tally = field(default_factory=Tally)
    taken: Tally = field(default_factory=Tally)
    groups_granted: int = 0
    learner_trained: Tally = field(default_factory=Tally)
    failures: dict[str, int] = field(default_factory=dict)
    """Failed training leases by kind."""
    held_out_failures: dict[str, int] = field(default_factory=dict)
    failure_examples: dict[str, str] = field(default_factory=dict)
    """The first full reason of each kind, of training and held-out failures."""
    # Sums over the last counts of all actors; every message of an actor carries its counts.
    tokens_generated: int = 0
    """Counted by the engines."""
    completions_generated: int = 0
    groups_continuing: int = 0
    """Groups in continuation: past the gate and still generating."""
    tokens_in_flight: int = 0
    actors: dict[str, ActorAccount] = field(default_factory=dict)

    @property
    def num_usable(self) -> int:
        """Groups that have entered the buffer, whatever became of them."""
        ended = (GroupEnd.TRAINED, GroupEnd.STALE, GroupEnd.EVICTED)
        return self.buffered.groups + self.taken.groups + sum(self.ends[e].groups for e in ended)

    @property
    def num_rejected(self) -> int:
        """Groups that were screened out or failed."""
        return self.ends[GroupEnd.SCREENED_OUT].groups + self.ends[GroupEnd.FAILED].groups

    @property
    def training_tokens(self) -> int:
        """Tokens of training groups that are no longer in flight."""
        return self.tokens_generated - self.tokens_in_flight - self.evaluation.tokens

    def actor(self, name: str) -> ActorAccount:
        account = self.actors.get(name)
        if account is None:
            account = self.actors[name] = ActorAccount()
        return account

    def granted(self, name: str, *, training: bool) -> None:
        self.actor(name).leases_granted += 1
        self.groups_granted += training

    def update_counts(self, name: str, counts: ActorCounts) -> None:
        account = self.actor(name)
        before, account.last_counts = account.last_counts, counts
        self.tokens_generated += counts.tokens_generated - before.tokens_generated
        self.completions_generated += counts.completions_generated - before.completions_generated
        self.groups_continuing += counts.groups_continuing - before.groups_continuing
        self.tokens_in_flight += counts.tokens_in_flight - before.tokens_in_flight

    def reported(self, name: str, tokens: int) -> None:
        """A lease of this actor ended with this many generated tokens."""
        account = self.actor(name)
        account.leases_ended += 1
        account.tokens_reported += tokens

    def failed(self, reason: str, tokens: int, groups: int = 1) -> None:
        self.ends[GroupEnd.FAILED].add(tokens, groups)
        self._count_failure(self.failures, reason)

    def held_out_failed(self, reason: str, tokens: int) -> None:
        self.evaluation.add(tokens)
        self._count_failure(self.held_out_failures, reason)

    def _count_failure(self, failures: dict[str, int], reason: str) -> None:
        kind = failure_kind(reason)
        if kind not in failures and len(failures) >= MAX_KINDS:
            kind = "other"
        failures[kind] = failures.get(kind, 0) + 1
        if len(self.failure_examples) <= 2 * MAX_KINDS:
            self.failure_examples.setdefault(kind, reason[:MAX_EXAMPLE_CHARS])

    def mark_lost(self, name: str, num_training: int, num_other: int, reason: str = "") -> None:
        """Count as failed everything that a lost actor last reported as in flight."""
        account = self.actor(name)
        held = account.last_counts.tokens_in_flight
        account.lost = True
        account.tokens_reported += held
        account.leases_ended += num_training + num_other
        counts = account.last_counts
        final_counts = ActorCounts(
            groups_leased=account.leases_granted,
            groups_in_flight=0,
            completions_generated=counts.completions_generated,
            tokens_generated=counts.tokens_generated,
            tokens_in_flight=0,
        )
        self.update_counts(name, final_counts)
        reason = f"actor lost: {name}: {reason}" if reason else "actor lost"
        self.failed(reason, held, num_training)

    def reconcile_with_learner(self, groups_trained: int, tokens_trained: int) -> None:
        """Adopt the learner's counts after the journal was truncated. Trained groups that are
        unknown here are attributed to BEFORE_TRUNCATION; groups counted here that the learner did
        not train end as failed."""
        trained = self.ends[GroupEnd.TRAINED]
        groups, tokens = groups_trained - trained.groups, tokens_trained - trained.tokens
        trained.add(tokens, groups)
        self.learner_trained = Tally(groups_trained, tokens_trained)
        if groups < 0:
            self.failed("journal cut", -tokens, -groups)
        elif groups > 0:
            account = self.actor(BEFORE_TRUNCATION)
            counts = account.last_counts
            account.leases_granted += groups
            account.leases_ended += groups
            account.tokens_reported += tokens
            self.groups_granted += groups
            self.update_counts(
                BEFORE_TRUNCATION,
                ActorCounts(
                    groups_leased=counts.groups_leased + groups,
                    tokens_generated=counts.tokens_generated + tokens,
                ),
            )

    def checks(self, groups_in_flight: int) -> dict[str, bool]:
        """Result of each named invariant. `groups_in_flight` is the number of open training
        leases."""
        ended_groups = sum(tally.groups for tally in self.ends.values())
        ended_tokens = sum(tally.tokens for tally in self.ends.values())
        held_tokens = self.buffered.tokens + self.taken.tokens + self.tokens_in_flight
        trained = self.ends[GroupEnd.TRAINED]
        return {
            "groups: granted = ended + buffered + in training + in flight": self.groups_granted
            == ended_groups + self.buffered.groups + self.taken.groups + groups_in_flight,
            "tokens: engines' generated = ended + evaluation + held": self.tokens_generated
            == ended_tokens + self.evaluation.tokens + held_tokens,
            "trained: learner's count = service's count": self.learner_trained == trained,
            "actors: own counts = what the service received": all(
                account.balanced for account in self.actors.values()
            ),
        }

    def engine_times_s(self) -> dict[str, float]:
        """Sum of ENGINE_TIMES over all actors; empty before the first report."""
        reported = [a.engine_times_s for a in self.actors.values() if a.engine_times_s]
        return {name: sum(t[name] for t in reported) for name in ENGINE_TIMES if reported}

    def verifier_sums(self) -> dict[str, float]:
        """Sums of the outcomes of the verifiers of all actors of the run, past ones included."""
        sums: dict[str, float] = {}
        for account in self.actors.values():
            for name, value in account.verifier_sums.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def by_actor(self) -> dict[str, object]:
        """Work of each incarnation of each actor, for `summary.json`."""
        return {
            name: {
                "leases": account.leases_ended,
                "tokens_generated": account.last_counts.tokens_generated,
                "lost": account.lost,
            }
            for name, account in self.actors.items()
        }

    def table(self, groups_in_flight: int) -> dict[str, object]:
        """The ledger of `summary.json`."""
        rows = {str(end): tally for end, tally in self.ends.items()}
        rows |= {"buffered": self.buffered, "in_training": self.taken}
        checks = self.checks(groups_in_flight)
        return {
            "groups": {"generated": self.groups_granted}
            | {name: tally.groups for name, tally in rows.items()}
            | {"in_flight": groups_in_flight, "evaluation": self.evaluation.groups},
            "tokens": {"generated": self.tokens_generated}
            | {name: tally.tokens for name, tally in rows.items()}
            | {"in_flight": self.tokens_in_flight, "evaluation": self.evaluation.tokens},
            "failures": dict(self.failures),
            "held_out_failures": dict(self.held_out_failures),
            "failure_examples": dict(self.failure_examples),
            "checks": checks,
            "closes": all(checks.values()),
        }
