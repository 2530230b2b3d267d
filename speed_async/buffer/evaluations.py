"""Schedules the evaluations of all suites as leases and aggregates their results."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from speed_async.config.sections.evaluate import HELD_OUT, EvaluateConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Pass rate of one prompt or of all prompts of a suite (mean@k), over the completions that the
    verifier scored, and the policy versions that sampled them."""

    suite: str
    policy_version: int
    """The version under evaluation."""
    num_passed: int
    num_completions: int
    """Scored completions."""
    num_unscored: int = 0
    """Completions without a verdict, because the verifier timed out or failed. They count neither
    as passed nor as failed."""
    num_truncated: int = 0
    """Completions truncated by a length limit."""
    oldest_version: int | None
    """Oldest and newest version of the tokens; None when there are none."""
    newest_version: int | None

    @property
    def sampled_version(self) -> int:
        """The newest version of the tokens, to which the accuracy is credited: a later version than
        the one under evaluation may have sampled most of them. That version if there are none."""
        return self.policy_version if self.newest_version is None else self.newest_version

    @property
    def accuracy(self) -> float:
        """0 if no completion was scored."""
        return self.num_passed / max(self.num_completions, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteResults:
    """Complete evaluations of a suite."""

    first: Accuracy
    last: Accuracy
    best: Accuracy
    """The one with the highest accuracy; of equal ones the earliest."""

    def followed_by(self, result: Accuracy) -> "SuiteResults":
        is_best = result.accuracy > self.best.accuracy
        return SuiteResults(first=self.first, last=result, best=result if is_best else self.best)


@dataclass(kw_only=True, slots=True)
class EvaluationState:
    """State of one suite."""

    target: int | None = None
    """Version under evaluation; None when no evaluation is running."""
    pending: deque[int] = field(default_factory=deque)
    """Prompts to lease."""
    num_open: int = 0
    finished: list[Accuracy] = field(default_factory=list)
    """Results of the finished prompts."""
    results: SuiteResults | None = None
    """None before the first evaluation is complete."""


class EvaluationPlan:
    """Runs one evaluation of a suite at a time; versions that become due meanwhile are skipped."""

    def __init__(
        self,
        suite: str,
        *,
        every: int,
        num_samples: int,
        num_prompts: int,
        state: EvaluationState,
    ) -> None:
        self.suite = suite
        self.num_samples = num_samples
        self._every = every
        self._num_prompts = num_prompts
        self._state = state

    @property
    def target_version(self) -> int | None:
        """Version under evaluation; None when no evaluation is running."""
        return self._state.target

    @property
    def evaluated_version(self) -> int | None:
        """The last evaluated version; None before the first evaluation is complete."""
        results = self._state.results
        return None if results is None else results.last.policy_version

    @property
    def results(self) -> SuiteResults | None:
        """None before the first evaluation is complete."""
        return self._state.results

    @property
    def has_pending(self) -> bool:
        """Whether a prompt can be leased."""
        return bool(self._state.pending)

    @property
    def progress(self) -> tuple[int, int]:
        """Finished and total prompts of the running evaluation; zeros when there is none."""
        if self._state.target is None:
            return 0, 0
        return self._num_prompts - self._state.num_open, self._num_prompts

    def due(self, policy_version: int) -> bool:
        """Whether to evaluate this version, which was published. It may be published again."""
        if self._state.target is not None or policy_version == self.evaluated_version:
            return False
        return self._every > 0 and policy_version % self._every == 0

    def start(self, policy_version: int) -> None:
        """Start an evaluation. The previous one must be complete, so that results do not mix."""
        assert self._state.target is None, (
            f"evaluation of version {self._state.target} is still running"
        )
        self._state.target = policy_version
        self._state.pending = deque(range(self._num_prompts))
        self._state.num_open = self._num_prompts
        self._state.finished = []

    def next_prompt(self) -> int | None:
        return self._state.pending.popleft() if self._state.pending else None

    def give_back(self, prompt_id: int) -> None:
        self._state.pending.append(prompt_id)

    def record(
        self,
        num_passed: int,
        num_completions: int,
        oldest_version: int | None,
        newest_version: int | None,
        *,
        num_unscored: int = 0,
        num_truncated: int = 0,
    ) -> Accuracy | None:
        """Record the result of one prompt, with `num_completions` scored completions; returns the
        accuracy after the last one."""
        state = self._state
        assert state.target is not None, "no evaluation is running"
        state.finished.append(
            Accuracy(
                suite=self.suite,
                policy_version=state.target,
                num_passed=num_passed,
                num_completions=num_completions,
                num_unscored=num_unscored,
                num_truncated=num_truncated,
                oldest_version=oldest_version,
                newest_version=newest_version,
            )
        )
        state.num_open -= 1
        if state.num_open:
            return None
        accuracy = _total(self.suite, state.target, state.finished)
        state.target, state.finished = None, []
        if state.results is None:
            state.results = SuiteResults(first=accuracy, last=accuracy, best=accuracy)
        else:
            state.results = state.results.followed_by(accuracy)
        return accuracy


class Evaluations:
    """The plans of all suites, that of the held-out prompts first."""

    def __init__(
        self,
        config: EvaluateConfig,
        num_prompts: Mapping[str, int],
        states: dict[str, EvaluationState],
    ) -> None:
        """`num_prompts`: of each suite."""
        self.held_out = EvaluationPlan(
            HELD_OUT,
            every=config.every,
            num_samples=config.num_samples,
            num_prompts=num_prompts[HELD_OUT],
            state=states[HELD_OUT],
        )
        self.plans: Sequence[EvaluationPlan] = [
            self.held_out,
            *(
                EvaluationPlan(
                    suite.name,
                    every=suite.every,
                    num_samples=suite.samples,
                    num_prompts=num_prompts[suite.name],
                    state=states[suite.name],
                )
                for suite in config.suites
            ),
        ]
        self._by_suite = {plan.suite: plan for plan in self.plans}

    def of(self, suite: str) -> EvaluationPlan:
        return self._by_suite[suite]

    @property
    def is_running(self) -> bool:
        return any(plan.target_version is not None for plan in self.plans)

    @property
    def progress(self) -> tuple[int, int] | None:
        """Finished and total prompts of all running evaluations; None when there is none."""
        if not self.is_running:
            return None
        done, total = zip(*(plan.progress for plan in self.plans), strict=True)
        return sum(done), sum(total)

    def leasable(self) -> list[EvaluationPlan]:
        """Plans with prompts to lease. The oldest target is first, so no suite starves another."""
        plans = [plan for plan in self.plans if plan.has_pending]
        return sorted(plans, key=lambda plan: plan.target_version or 0)

    def start_due(self, policy_version: int) -> list[EvaluationPlan]:
        """Start the evaluations that are due at this version, which was published."""
        return self._start(
            [plan for plan in self.plans if plan.due(policy_version)], policy_version
        )

    def start_missing(self, policy_version: int) -> list[EvaluationPlan]:
        """Start the evaluation of this version by all suites that have none of it and are idle."""
        return self._start(self._missing(policy_version), policy_version)

    def can_start(self, policy_version: int) -> bool:
        """Whether `start_missing` would start an evaluation."""
        return bool(self._missing(policy_version))

    def are_complete(self, policy_version: int) -> bool:
        """Whether all suites have evaluated this version."""
        return all(plan.evaluated_version == policy_version for plan in self.plans)

    def _missing(self, policy_version: int) -> list[EvaluationPlan]:
        idle = [plan for plan in self.plans if plan.target_version is None]
        return [plan for plan in idle if plan.evaluated_version != policy_version]

    def _start(self, plans: list[EvaluationPlan], policy_version: int) -> list[EvaluationPlan]:
        for plan in plans:
            plan.start(policy_version)
        return plans


def new_evaluation_states(
    config: EvaluateConfig, num_prompts: Mapping[str, int]
) -> dict[str, EvaluationState]:
    """The states of a new run, whose first evaluations have begun."""
    states = {suite: EvaluationState() for suite in (HELD_OUT, *(s.name for s in config.suites))}
    Evaluations(config, num_prompts, states).start_missing(0)
    return states


def _total(suite: str, policy_version: int, results: Sequence[Accuracy]) -> Accuracy:
    return Accuracy(
        suite=suite,
        policy_version=policy_version,
        num_passed=sum(each.num_passed for each in results),
        num_completions=sum(each.num_completions for each in results),
        num_unscored=sum(each.num_unscored for each in results),
        num_truncated=sum(each.num_truncated for each in results),
        oldest_version=min(_known(each.oldest_version for each in results), default=None),
        newest_version=max(_known(each.newest_version for each in results), default=None),
    )


def _known(versions: Iterable[int | None]) -> list[int]:
    return [version for version in versions if version is not None]
