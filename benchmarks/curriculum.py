"""Compare uniform and posterior sampling of prompts on simulated, drifting pass rates.

Each prompt has a logit that rises with every version (a common speed plus individual noise) and a
little more when the prompt is trained. A lease samples 4 completions, and 20 more when their
outcomes are mixed. 64 leases are open at any time and finish in the order they began, so a choice
does not know the latest outcomes. Every arm makes 150 updates of 16 accepted groups. All arms of
one spread and seed start from the same pass rates. Figures are means over the seeds. The simulation
measures cost only, not how well a policy learns from repeated prompts.

Usage: python -m benchmarks.curriculum [--quick]
"""

import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import report
from speed_async.buffer.curriculum.beliefs import GateAcceptance
from speed_async.buffer.curriculum.curriculum import Curriculum, UniformCurriculum, UniformState
from speed_async.buffer.curriculum.posterior import PosteriorCurriculum, PosteriorState
from speed_async.config.sections.curriculum import CurriculumConfig
from speed_async.config.sections.gate import GateConfig

GATE = GateConfig()
NUM_PROMPTS, NUM_UPDATES, GROUPS_PER_UPDATE, NUM_OPEN = 4_096, 150, 16, 64
SPEED, NOISE, TRAINING_LIFT = 0.01, 0.05, 0.1
"""Logits per version: common rise, deviation of a prompt; and logits added by one training."""
THETA_DRAWS = 64
MILLIONS = 10_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Initial pass rates: shares below `low` and above `high`, the rest uniform in between."""

    name: str
    low: float
    share_below: float
    high: float
    share_above: float

    def logits(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """(NUM_PROMPTS,) logits; the tails reach pass rates of 1 in 3,000, uniform in the logit."""
        kind = rng.random(NUM_PROMPTS)
        below = rng.uniform(-8, _logit(self.low), NUM_PROMPTS)
        above = rng.uniform(_logit(self.high), 8, NUM_PROMPTS)
        between = _logit(rng.uniform(self.low, self.high, NUM_PROMPTS))
        return np.where(
            kind < self.share_below, below, np.where(kind > 1 - self.share_above, above, between)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    name: str
    settings: CurriculumConfig | None = None

    def curriculum(self, num_prompts: int, seed: int) -> Curriculum:
        rng = np.random.default_rng(seed)
        if self.settings is None:
            return UniformCurriculum(num_prompts, UniformState(rng=rng))
        return PosteriorCurriculum(
            num_prompts, PosteriorState.new(num_prompts, rng), gate=GATE, settings=self.settings
        )


def posterior_arm(candidates: int, half_life: float, share: float) -> Arm:
    settings = CurriculumConfig(
        kind="posterior", candidates=candidates, half_life_updates=half_life, uniform_share=share
    )
    return Arm(name=f"posterior c{candidates} h{half_life:g} u{share:g}", settings=settings)


SPREADS = (
    Spread(name="quickstart", low=0.05, share_below=0.367, high=0.8, share_above=0.33),
    Spread(name="real", low=0.05, share_below=0.45, high=0.95, share_above=0.20),
)
ARMS = (
    Arm(name="uniform"),
    posterior_arm(4, 20, 0.1),
    posterior_arm(2, 20, 0.1),
    posterior_arm(8, 20, 0.1),
    posterior_arm(16, 20, 0.1),
    posterior_arm(4, 5, 0.1),
    posterior_arm(4, 10, 0.1),
    posterior_arm(4, 40, 0.1),
    posterior_arm(4, 1000, 0.1),
    posterior_arm(4, 20, 0.02),
    posterior_arm(4, 20, 0.25),
    posterior_arm(4, 20, 0.5),
    posterior_arm(8, 40, 0.1),
    posterior_arm(8, 40, 0.25),
)


class Trial:
    """One arm over drifting pass rates."""

    def __init__(self, spread: Spread, arm: Arm, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._logits_N = spread.logits(self._rng)
        self._curriculum = arm.curriculum(NUM_PROMPTS, seed + 1)
        self._odds = GateAcceptance(GATE)
        self._open: deque[tuple[int, float]] = deque()
        self._version = 0
        self._last_screened_N = np.full(NUM_PROMPTS, -1)
        self._longest_wait_N = np.zeros(NUM_PROMPTS, np.int64)
        self._trained_N = np.zeros(NUM_PROMPTS, np.int64)
        self._predicted: list[float] = []
        self._passed: list[bool] = []
        self._signal: list[float] = []

    def run(self) -> dict[str, float]:
        accepted = self._until_accepted(NUM_UPDATES * GROUPS_PER_UPDATE)
        screened = len(self._passed)
        never = self._last_screened_N < 0
        wait_N = np.maximum(self._longest_wait_N, NUM_UPDATES - self._last_screened_N)
        return {
            "accepted_percent": 100 * accepted / screened,
            "screening_per_group": GATE.n_init * screened / accepted,
            "completions_per_group": GATE.n_init * screened / accepted + GATE.n_cont,
            "mean_signal": statistics.mean(self._signal),
            "ever_screened_percent": 100 * float(1 - never.mean()),
            "longest_wait_updates": float(np.where(never, NUM_UPDATES, wait_N).max()),
            "distinct_trained": float(np.count_nonzero(self._trained_N)),
            "most_trained": float(self._trained_N.max()),
            "predicted_percent": 100 * statistics.mean(self._predicted),
            "calibration_error": self._calibration_error(),
        }

    def _until_accepted(self, num_groups: int) -> int:
        accepted = 0
        while accepted < num_groups:
            self._lease()
            prompt, predicted = self._open.popleft()
            if self._finish(prompt, predicted):
                accepted += 1
                if accepted % GROUPS_PER_UPDATE == 0:
                    self._update()
        return accepted

    def _lease(self) -> None:
        for prompt in self._curriculum.choose(NUM_OPEN - len(self._open)):
            self._open.append((prompt, self._prediction(prompt)))

    def _prediction(self, prompt: int) -> float:
        if not isinstance(self._curriculum, PosteriorCurriculum):
            return float("nan")
        alpha, beta = self._curriculum.beliefs.posterior(np.array([prompt]))
        # A separate generator, so that the prediction does not affect the choices.
        theta = np.random.default_rng(prompt).beta(alpha, beta, THETA_DRAWS)
        return float(self._odds(theta).mean())

    def _finish(self, prompt: int, predicted: float) -> bool:
        theta = float(_sigmoid(self._logits_N[prompt]))
        num_passed, num_completions = int(self._rng.binomial(GATE.n_init, theta)), GATE.n_init
        accepted = 0 < num_passed < GATE.n_init
        if accepted:
            num_passed += int(self._rng.binomial(GATE.n_cont, theta))
            num_completions = GATE.group_size
            self._logits_N[prompt] += TRAINING_LIFT
            self._trained_N[prompt] += 1
            self._signal.append(4 * theta * (1 - theta))
        self._curriculum.record(prompt, num_passed, num_completions)
        wait = self._version - max(int(self._last_screened_N[prompt]), 0)
        self._longest_wait_N[prompt] = max(self._longest_wait_N[prompt], wait)
        self._last_screened_N[prompt] = self._version
        self._predicted.append(predicted)
        self._passed.append(accepted)
        return accepted

    def _update(self) -> None:
        self._version += 1
        self._logits_N += SPEED + NOISE * self._rng.standard_normal(NUM_PROMPTS)
        self._curriculum.advance(self._version)

    def _calibration_error(self) -> float:
        """Mean distance, in points, between predicted and observed over ten bins of prediction."""
        predicted, passed = np.array(self._predicted), np.array(self._passed)
        if np.isnan(predicted).any():
            return float("nan")
        bins = np.minimum((predicted * 10).astype(int), 9)
        gaps = [
            abs(predicted[bins == b].mean() - passed[bins == b].mean()) * (bins == b).mean()
            for b in np.unique(bins)
        ]
        return 100 * float(sum(gaps))


def _logit(p: float | NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.asarray(p)
    return np.log(p / (1 - p))


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def compare(seeds: range) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for spread in SPREADS:
        for arm in ARMS:
            runs = [Trial(spread, arm, seed).run() for seed in seeds]
            means = {key: _mean([run[key] for run in runs]) for key in runs[0]}
            rows.append({"spread": spread.name, "arm": arm.name, **means})
    return rows


def _mean(values: list[float]) -> float | None:
    """None where the arm makes no predictions."""
    mean = statistics.mean(values)
    return None if np.isnan(mean) else round(mean, 2)


def time_millions() -> list[dict[str, object]]:
    """Choose 1,000 of 10 million prompts, at the start and after 100,000 outcomes."""
    curriculum = PosteriorCurriculum(
        MILLIONS,
        PosteriorState.new(MILLIONS, np.random.default_rng(0)),
        gate=GATE,
        settings=CurriculumConfig(kind="posterior"),
    )
    rows: list[dict[str, object]] = []
    for when in ("first 20 choices", "after 100,000 outcomes"):
        choose_s, record_s = _choose_and_record(curriculum, 20)
        rows.append(
            {
                "when": when,
                "choose_1000_ms": 1e3 * choose_s,
                "choose_1_us": 1e6 * _choose_one_s(curriculum),
                "record_us": 1e6 * record_s / 1_000,
                "megabytes": curriculum.num_bytes / 1e6,
            }
        )
        _choose_and_record(curriculum, 80)
    return rows


def _choose_and_record(curriculum: PosteriorCurriculum, num_rounds: int) -> tuple[float, float]:
    """Median seconds to choose 1,000 prompts, and to record their outcomes."""
    choose_s, record_s = [], []
    for _ in range(num_rounds):
        started_s = time.perf_counter()
        chosen = curriculum.choose(1_000)
        chosen_s = time.perf_counter()
        for prompt in chosen:
            curriculum.record(prompt, *((10, 24) if prompt % 3 == 0 else (0, 4)))
        choose_s.append(chosen_s - started_s)
        record_s.append(time.perf_counter() - chosen_s)
    return statistics.median(choose_s), statistics.median(record_s)


def _choose_one_s(curriculum: PosteriorCurriculum) -> float:
    """Median seconds to choose one prompt, as an actor with one free slot requests it."""
    times_s = []
    for _ in range(1_000):
        started_s = time.perf_counter()
        [prompt] = curriculum.choose(1)
        times_s.append(time.perf_counter() - started_s)
        curriculum.record(prompt, 0, GATE.n_init)
    return statistics.median(times_s)


def main() -> None:
    seeds = range(1) if "--quick" in sys.argv else range(3)
    report("curriculum", f"{NUM_UPDATES} updates of {GROUPS_PER_UPDATE} groups", compare(seeds))
    report("curriculum_millions", "10 million prompts, one thread", time_millions())


if __name__ == "__main__":
    main()
