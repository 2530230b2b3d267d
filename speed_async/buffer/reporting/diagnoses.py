"""Diagnoses: human-readable reasons why the run currently cannot learn, each with a remedy.

The rules read the evidence at every tick. A diagnosis therefore appears within a minute of its
cause and disappears when it no longer holds. All occurrences are kept for the summary. The numbers
in a text date from its first occurrence, and are refreshed whenever its duration has doubled: views
that print changed texts do not repeat it twice per second.
"""

from dataclasses import dataclass, field

from speed_async.buffer.reporting.evidence import Evidence, Peaks
from speed_async.buffer.reporting.rules import Finding, Rules
from speed_async.buffer.reporting.statistics import RunStatistics
from speed_async.config.schema import Config
from speed_async.observability.notation import counted, duration

RENEW_AFTER_S = 20.0


@dataclass(kw_only=True, slots=True)
class Occurrence:
    """One kind of diagnosis over the whole run."""

    finding: Finding
    first_s: float
    first_version: int
    since_s: float
    """Time at which it last became active."""
    since_version: int
    last_s: float
    last_version: int
    renewed_s: float
    num_times: int = 1
    active: bool = True

    @property
    def text(self) -> str:
        since = f"since {duration(self.since_s)} (version {self.since_version})"
        return f"{self.finding.facts}, {since}. Change: {self.finding.change}"


@dataclass(kw_only=True, slots=True)
class DiagnosesState:
    evidence: Evidence
    occurred: dict[str, Occurrence] = field(default_factory=dict)
    peaks: Peaks = field(default_factory=Peaks)


class Diagnoses:
    def __init__(self, config: Config, statistics: RunStatistics, state: DiagnosesState) -> None:
        self.evidence = state.evidence
        self._statistics = statistics
        self._state = state
        self._rules = Rules(config, statistics, state.evidence, state.peaks)

    @property
    def active(self) -> list[str]:
        """One text for each active diagnosis."""
        return [each.text for each in self._state.occurred.values() if each.active]

    def evaluated(self, accuracy: float, num_completions: int, policy_version: int) -> None:
        self._rules.evaluated(accuracy, num_completions, policy_version)

    def evaluate(self, now_s: float, policy_version: int, *, waited_s: float | None) -> None:
        """Apply every rule. `waited_s`: how long the learner has waited for a batch, or None."""
        occurred = self._state.occurred
        active = {kind for kind, each in occurred.items() if each.active}
        shown = self._rules.findings(now_s, policy_version, active=active, waited_s=waited_s)
        for kind in list(occurred) + [kind for kind in shown if kind not in occurred]:
            self._note(kind, shown.get(kind), now_s - self._statistics.started_s, policy_version)

    def nothing_learned(self) -> str | None:
        """Why no update of the run had an effect. None if one had, or if there were no updates."""
        updates = self.evidence.updates
        if not updates.nothing_learned:
            return None
        made, skipped = updates.num_made, updates.num_skipped
        parts = [f"{made - skipped} had no gradient"] if made > skipped else []
        parts += [f"{skipped} had numbers that are not finite and were skipped"] if skipped else []
        active = [each.finding.facts for each in self._state.occurred.values() if each.active]
        causes = "".join(f"; {facts}" for facts in active)
        return f"nothing was learned: of {counted(made, 'update')}, {' and '.join(parts)}{causes}"

    def record(self) -> list[dict[str, object]]:
        """All occurrences, for summary.json."""
        return [
            {
                "what": kind,
                "text": each.text,
                "first_s": round(each.first_s, 1),
                "first_version": each.first_version,
                "last_s": round(each.last_s, 1),
                "last_version": each.last_version,
                "times": each.num_times,
                "active_at_end": each.active,
            }
            for kind, each in self._state.occurred.items()
        ]

    def _note(self, kind: str, finding: Finding | None, at_s: float, version: int) -> None:
        each = self._state.occurred.get(kind)
        if finding is None:
            if each is not None:
                each.active = False
            return
        if each is None:
            self._state.occurred[kind] = Occurrence(
                finding=finding,
                first_s=at_s,
                first_version=version,
                since_s=at_s,
                since_version=version,
                last_s=at_s,
                last_version=version,
                renewed_s=at_s,
            )
            return
        if not each.active:
            each.active, each.num_times = True, each.num_times + 1
            each.since_s, each.since_version = at_s, version
            each.finding, each.renewed_s = finding, at_s
        each.last_s, each.last_version = at_s, version
        lasted_s = each.renewed_s - each.since_s
        if at_s - each.renewed_s >= max(RENEW_AFTER_S, lasted_s):
            each.finding, each.renewed_s = finding, at_s
