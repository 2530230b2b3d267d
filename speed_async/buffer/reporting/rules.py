"""Rules that find reasons why the run currently cannot learn, each with a remedy.

A rule that was active before holds until a second, weaker threshold.
"""

from dataclasses import dataclass

from speed_async.buffer.reporting.evidence import (
    WINDOW_COMPLETIONS,
    WINDOW_UPDATES,
    CompletionWindow,
    Evidence,
    Peaks,
    UpdateRecord,
)
from speed_async.buffer.reporting.statistics import ACCEPTANCE_WINDOW, RunStatistics
from speed_async.config.schema import Config
from speed_async.config.sections.gate import GateConfig
from speed_async.config.sections.objective import ACROSS_GROUPS

MIN_COMPLETIONS = 128
PATIENCE_S = 30.0
"""Fewer than WINDOW_COMPLETIONS completions suffice when they span this time."""
MIN_LEASES = 16
FAILING, STILL_FAILING = 0.2, 0.1
HELD_OUT_FAILING = 0.02
TRUNCATED, STILL_TRUNCATED = 0.95, 0.9
STILL_UNREWARDED = 0.01
STARVING_AFTER_S = 20.0
STARVING_MIN_SCREENED = 64
STARVING_ACCEPTANCE = 0.02
MIN_UPDATES = 3
NOT_FINITE = 0.5
COLLAPSED, STILL_COLLAPSED = 0.5, 0.7
"""Fractions of the best value: a collapse begins below the first and ends above the second."""
MIN_EVALUATED = 64
"""Minimum completions of an evaluation whose accuracy can indicate a collapse."""
LATE, STILL_LATE = 0.3, 0.2
"""Shares of the time of recent updates."""
MAX_EXAMPLE_CHARS = 300

EXPLAINED_BY = {
    "no_reward": ("truncated", "collapsed"),
    "gate_starves": ("truncated", "no_reward", "collapsed"),
    "no_signal": ("truncated", "no_reward", "collapsed", "not_finite"),
}
"""A diagnosis is hidden while one of its causes holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The problem with its numbers, and the remedy. The time is added later."""

    facts: str
    change: str


class Rules:
    def __init__(
        self, config: Config, statistics: RunStatistics, evidence: Evidence, peaks: Peaks
    ) -> None:
        self._config = config
        self._statistics = statistics
        self._evidence = evidence
        self._peaks = peaks

    def evaluated(self, accuracy: float, num_completions: int, policy_version: int) -> None:
        if num_completions < MIN_EVALUATED:
            return
        self._peaks.last_accuracy = accuracy
        self._peaks.best_accuracy.update(accuracy, policy_version)

    def findings(
        self, now_s: float, policy_version: int, *, active: set[str], waited_s: float | None
    ) -> dict[str, Finding]:
        """What holds now and is not explained by another finding, causes first. `active` are the
        kinds that held before; `waited_s`: how long the learner has waited for a batch, or None."""
        if (mean := self._windowed_pass_rate()) is not None:
            self._peaks.best_pass_rate.update(mean, policy_version)
        results = {
            "failures": self._failures("failures" in active),
            "held_out_failures": self._held_out_failures(),
            "not_finite": self._not_finite(),
            "truncated": self._truncated("truncated" in active, now_s),
            "collapsed": self._collapsed("collapsed" in active),
            "no_reward": self._no_reward("no_reward" in active, now_s),
            "no_signal": self._no_signal(),
            "gate_starves": self._gate_starves("gate_starves" in active, waited_s),
            "late_groups": self._late_groups("late_groups" in active),
        }
        found = {kind: finding for kind, finding in results.items() if finding is not None}
        return {
            kind: finding
            for kind, finding in found.items()
            if not any(cause in found for cause in EXPLAINED_BY.get(kind, ()))
        }

    def _failures(self, held: bool) -> Finding | None:
        window = self._evidence.training_failures
        if len(window) < MIN_LEASES or window.share < (STILL_FAILING if held else FAILING):
            return None
        times, example = window.most_common()
        return Finding(
            facts=f"prompts fail: {window.num_failed} of the last {len(window)} training prompts "
            f"gave no result; {times} times, for example: {shortened(example)}",
            change="fix or remove the prompts named in the example, or fix their verifier",
        )

    def _held_out_failures(self) -> Finding | None:
        window = self._evidence.held_out_failures
        if len(window) < MIN_LEASES or window.share < HELD_OUT_FAILING:
            return None
        times, example = window.most_common()
        return Finding(
            facts=f"held-out prompts fail: {window.num_failed} of the last {len(window)} have "
            f"completions that were not scored; {times} times, for example: {shortened(example)}",
            change="correct or remove these prompts, or fix their verifier: the accuracy counts "
            "what was not sampled as not passed, and leaves out what has no verdict",
        )

    def _not_finite(self) -> Finding | None:
        recent = self._evidence.updates.recent
        num_skipped = sum(update.skipped for update in recent)
        if len(recent) < MIN_UPDATES or num_skipped < NOT_FINITE * len(recent):
            return None
        return Finding(
            facts=f"updates are not finite: {num_skipped} of the last {len(recent)} were skipped "
            "because a loss, a gradient or an input was not a finite number",
            change="lower learner.lr, and resume from a checkpoint before the first of them; check "
            "the rewards of a custom task",
        )

    def _truncated(self, held: bool, now_s: float) -> Finding | None:
        window = self._completions()
        share = window.truncated_share
        if share is None or not _is_enough(window, now_s):
            return None
        if share < (STILL_TRUNCATED if held else TRUNCATED):
            return None
        return Finding(
            facts=f"completions are truncated: {window.num_truncated} of the last "
            f"{window.num_completions} reached a length limit before they ended, "
            f"{window.num_rewarded} earned a reward",
            change=f"raise actors.max_new_tokens (now {self._config.actors.max_new_tokens}) or "
            "model.context_length, or use a model that ends its answers (its EOS token, "
            "model.chat_template, model.stop_tokens)",
        )

    def _no_reward(self, held: bool, now_s: float) -> Finding | None:
        """One or two passed completions do not end the diagnosis."""
        window = self._completions()
        tolerated = STILL_UNREWARDED * window.num_completions if held else 0
        if window.num_rewarded > tolerated or window.num_completions < MIN_COMPLETIONS:
            return None
        if not (_is_enough(window, now_s) or self._updates_lack_gradient()):
            return None
        return Finding(
            facts=f"no reward: {window.num_rewarded or 'none'} of the last "
            f"{window.num_completions} completions passed "
            f"({window.num_truncated} of them were truncated)",
            change="check in samples.jsonl whether the verifier parses the answers (task.match); "
            "then try easier prompts, a stronger model, or a larger actors.max_new_tokens",
        )

    def _no_signal(self) -> Finding | None:
        if any(update.has_gradient for update in self._evidence.updates.recent):
            return None
        facts = ""
        if self._updates_lack_gradient():
            num_updates = len(self._steps())
            facts = f"the last {num_updates} updates had a gradient of zero"
        elif self._groups_lack_spread():
            num_groups = len(self._evidence.reward_ranges)
            facts = f"in each of the last {num_groups} groups all rewards were equal"
        if not facts:
            return None
        mean = self._statistics.reward_mean
        known = "" if mean is None else f" (mean pass rate {mean:.3f})"
        difficulty = "harder" if (mean or 0.0) > 0.5 else "easier"
        return Finding(
            facts=f"no signal: {facts}{known}",
            change=f"{difficulty} prompts, larger groups (gate.n_init + gate.n_cont), "
            'or a gate that keeps prompts of moderate difficulty (algorithm = "speed-rloo")',
        )

    def _updates_lack_gradient(self) -> bool:
        """Whether at least MIN_UPDATES recent updates exist and none had a gradient."""
        steps = self._steps()
        return len(steps) >= MIN_UPDATES and not any(step.has_gradient for step in steps)

    def _steps(self) -> list[UpdateRecord]:
        return [update for update in self._evidence.updates.recent if not update.skipped]

    def _groups_lack_spread(self) -> bool:
        ranges = self._evidence.reward_ranges
        if len(ranges) < (ranges.maxlen or 0) or self._config.objective.overlong_share > 0:
            return False
        if self._config.objective.advantage in ACROSS_GROUPS:
            return min(low for low, _ in ranges) == max(high for _, high in ranges)
        return all(low == high for low, high in ranges)

    def _gate_starves(self, held: bool, waited_s: float | None) -> Finding | None:
        acceptance, gate = self._statistics.gate_acceptance, self._config.gate
        num_screened = self._statistics.num_recently_screened
        if gate.mode == "off" or num_screened < STARVING_MIN_SCREENED:
            return None
        if acceptance is None or acceptance >= STARVING_ACCEPTANCE:
            return None
        if not held and (waited_s is None or waited_s < STARVING_AFTER_S):
            return None
        pass_rate = self._statistics.reward_mean or 0.0
        return gate_starves(
            num_screened=num_screened, acceptance=acceptance, pass_rate=pass_rate, gate=gate
        )

    def _late_groups(self, held: bool) -> Finding | None:
        share = self._evidence.updates.late_share
        if share < (STILL_LATE if held else LATE):
            return None
        return Finding(
            facts=f"updates wait for long completions: in {share:.0%} of the time of the last "
            f"{WINDOW_UPDATES} updates, a full batch waited for groups that the update would have "
            "made stale",
            change=f"raise buffer.max_staleness (now {self._config.buffer.max_staleness}) or lower "
            "actors.max_new_tokens; buffer.late_groups = 'drop' trains without these groups, and "
            "so favours short completions",
        )

    def _collapsed(self, held: bool) -> Finding | None:
        share = STILL_COLLAPSED if held else COLLAPSED
        change = (
            "lower learner.lr or buffer.max_staleness, and restart from a checkpoint before the "
            "collapse"
        )
        # A learning curriculum changes the pass rate through its choice of prompts.
        is_uniform = self._config.curriculum.kind == "uniform"
        mean = self._windowed_pass_rate() if is_uniform else None
        drop, accuracy = self._peaks.best_pass_rate.drop(mean, share), self._peaks.last_accuracy
        if drop:
            return Finding(facts=f"reward collapsed: the mean pass rate {drop}", change=change)
        if drop := self._peaks.best_accuracy.drop(accuracy, share):
            return Finding(facts=f"reward collapsed: held-out accuracy {drop}", change=change)
        return None

    def _windowed_pass_rate(self) -> float | None:
        """Over a full window, so that noise does not create a best value or a drop."""
        if self._statistics.num_recently_screened < ACCEPTANCE_WINDOW:
            return None
        return self._statistics.reward_mean

    def _completions(self) -> CompletionWindow:
        """Those of training, or those of the evaluation while there are none."""
        evidence = self._evidence
        return evidence.training if evidence.training.num_completions else evidence.held_out


def gate_starves(
    *, num_screened: int, acceptance: float, pass_rate: float, gate: GateConfig
) -> Finding:
    return Finding(
        facts=f"the gate starves: of the last {num_screened} prompts {acceptance:.1%} passed "
        f"({gate.low} < pass rate < {gate.high}), mean pass rate {pass_rate:.3f}",
        change=gate_remedy(gate, pass_rate),
    )


def gate_remedy(gate: GateConfig, pass_rate: float) -> str:
    """How to change the gate when few prompts pass. `pass_rate`: mean of the screened prompts."""
    if pass_rate <= max(gate.low, 0.1):
        lower = ", a lower gate.low" if gate.low > 0 else ""
        return (
            f"easier prompts, a larger gate.n_init{lower}, or a larger actors.max_new_tokens where "
            "answers are cut off"
        )
    if pass_rate >= min(gate.high, 0.9):
        higher = ", or a higher gate.high" if gate.high < 1 else ""
        return f"harder prompts, a larger gate.n_init{higher}"
    return "a wider band (gate.low, gate.high), or a larger gate.n_init"


def shortened(text: str) -> str:
    """An example as one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_EXAMPLE_CHARS else line[: MAX_EXAMPLE_CHARS - 3] + "..."


def _is_enough(window: CompletionWindow, now_s: float) -> bool:
    if window.num_completions < MIN_COMPLETIONS:
        return False
    return window.num_completions >= WINDOW_COMPLETIONS or window.span_s(now_s) >= PATIENCE_S
