"""The ledger: every group and every token ends exactly once, and the books close.

Three parties count on their own: engines count tokens where they sample them, actors count what
they hold, the service counts what reaches it, and the learner counts what it trained. `checks`
compares them.
"""

from dataclasses import dataclass, field

from speed_async.types import ActorCounts, GroupEnd

BEFORE_THE_CUT = "before-the-cut"
"""Stands for actors whose work is known by the learner's word alone."""

MAX_KINDS, MAX_KIND_CHARS, MAX_EXAMPLE_CHARS = 64, 100, 500
"""Kinds of failure told apart, and what is kept of them: an actor words them."""


def failure_kind(reason: str) -> str:
    """What stands before the first colon of a reason."""
    return reason.split(":", 1)[0][:MAX_KIND_CHARS]


ENGINE_TIMES = ("sampling_s", "updating_s", "uptime_s")
"""Gauges of an actor's engine, which grow as long as it lives."""


@dataclass(slots=True)
class Tally:
    """Groups and generated tokens that came to one end."""

    groups: int = 0
    tokens: int = 0

    def add(self, tokens: int, groups: int = 1) -> None:
        self.groups += groups
        self.tokens += tokens


@dataclass(slots=True)
class ActorAccount:
    """The service's view of one actor, beside that actor's own last word."""

    leases_granted: int = 0
    leases_ended: int = 0
    tokens_reported: int = 0
    last_counts: ActorCounts = field(default_factory=ActorCounts)
    engine_times_s: dict[str, float] = field(default_factory=dict)
    """Its last report's ENGINE_TIMES."""
    lost: bool = False

    @property
    def balanced(self) -> bool:
        """The actor's counts explain exactly what the service has received from it."""
        counts = self.last_counts
        return (
            counts.tokens_generated == self.tokens_reported + counts.tokens_in_flight
            and counts.groups_leased == self.leases_ended + counts.groups_in_flight
        )


class Ledger:
    def __init__(self) -> None:
        self.ends: dict[GroupEnd, Tally] = {end: Tally() for end in GroupEnd}
        self.evaluation = Tally()
        self.buffered = Tally()
        self.taken = Tally()
        self.groups_granted = 0
        self.learner_trained = Tally()
        self.failures: dict[str, int] = {}
        """Failed training leases by kind."""
        self.held_out_failures: dict[str, int] = {}
        self.failure_examples: dict[str, str] = {}
        """The first reason of each kind of either, in full."""
        # Sums of the actors' last words, which come with every message of every actor.
        self.tokens_generated = 0
        """As counted by the engines."""
        self.completions_generated = 0
        self.groups_continuing = 0
        """Groups past the gate that their actors still generate."""
        self.tokens_in_flight = 0
        self._actors: dict[str, ActorAccount] = {}

    def actor(self, name: str) -> ActorAccount:
        return self._actors.setdefault(name, ActorAccount())

    def granted(self, name: str, *, training: bool) -> None:
        self.actor(name).leases_granted += 1
        self.groups_granted += training

    def heard(self, name: str, counts: ActorCounts) -> None:
        book = self.actor(name)
        before, book.last_counts = book.last_counts, counts
        self.tokens_generated += counts.tokens_generated - before.tokens_generated
        self.completions_generated += counts.completions_generated - before.completions_generated
        self.groups_continuing += counts.groups_continuing - before.groups_continuing
        self.tokens_in_flight += counts.tokens_in_flight - before.tokens_in_flight

    def reported(self, name: str, tokens: int) -> None:
        """A lease of this actor ended with this many generated tokens."""
        book = self.actor(name)
        book.leases_ended += 1
        book.tokens_reported += tokens

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

    def lose(self, name: str, num_training: int, num_other: int, why: str = "") -> None:
        """The actor died: what it last said to hold ends as failed."""
        book = self.actor(name)
        held = book.last_counts.tokens_in_flight
        book.lost = True
        book.tokens_reported += held
        book.leases_ended += num_training + num_other
        counts = book.last_counts
        last_word = ActorCounts(
            groups_leased=book.leases_granted,
            groups_in_flight=0,
            completions_generated=counts.completions_generated,
            tokens_generated=counts.tokens_generated,
            tokens_in_flight=0,
        )
        self.heard(name, last_word)
        self.failed(f"actor lost: {name}: {why}" if why else "actor lost", held, num_training)

    def follow_learner(self, groups_trained: int, tokens_trained: int) -> None:
        """The journal was cut: what the learner trained beyond what is known here was generated
        by actors of which nothing is known; what it has not trained after all is lost."""
        trained = self.ends[GroupEnd.TRAINED]
        groups, tokens = groups_trained - trained.groups, tokens_trained - trained.tokens
        trained.add(tokens, groups)
        self.learner_trained = Tally(groups_trained, tokens_trained)
        if groups < 0:
            self.failed("journal cut", -tokens, -groups)
        elif groups > 0:
            book = self.actor(BEFORE_THE_CUT)
            counts = book.last_counts
            book.leases_granted += groups
            book.leases_ended += groups
            book.tokens_reported += tokens
            self.groups_granted += groups
            self.heard(
                BEFORE_THE_CUT,
                ActorCounts(
                    groups_leased=counts.groups_leased + groups,
                    tokens_generated=counts.tokens_generated + tokens,
                ),
            )

    def checks(self, groups_in_flight: int) -> dict[str, bool]:
        """Each named equation of the books. `groups_in_flight`: open training leases."""
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
                book.balanced for book in self._actors.values()
            ),
        }

    def engine_times_s(self) -> dict[str, float]:
        """ENGINE_TIMES of all actors together; empty while none has reported."""
        told = [book.engine_times_s for book in self._actors.values() if book.engine_times_s]
        return {name: sum(times_s[name] for times_s in told) for name in ENGINE_TIMES if told}

    def by_actor(self) -> dict[str, object]:
        """What each incarnation of each actor did, for `summary.json`."""
        return {
            name: {
                "leases": book.leases_ended,
                "tokens_generated": book.last_counts.tokens_generated,
                "lost": book.lost,
            }
            for name, book in self._actors.items()
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
