"""What is measured, fixed before the runs: spreads, targets, arms, settings, seeds, comparisons.

A change of anything here that a run depends on is a new experiment: change `EXPERIMENT`, and runs
recorded under another name no longer count.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from benchmarks.evidence.spreads import NUM_ANSWER_CHARACTERS, Spread

EXPERIMENT = "2026-11-30b"

NUM_TRAIN, NUM_SCORED, DATA_SEED = 2560, 800, 5
COMPLETIONS, FEW_COMPLETIONS = 384, 96
"""Per update."""

TUNING_SEEDS = (1001, 1002, 1003)
NUM_SURVIVORS = 4
"""Settings of an arm that run with all tuning seeds; the others run with the first one only."""
DECIDING_SEEDS = tuple(range(20))
OTHER_SEEDS = DECIDING_SEEDS[:8]

Mode = Literal["sync", "async"]
Endpoint = Literal["tokens", "core_s", "wall_s"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SpreadPlan:
    spread: Spread
    targets: tuple[float, float]
    """Exact accuracies: mid and high."""
    horizon_tokens: int
    """Each run generates this many tokens, whatever it has reached by then."""
    arms: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    mode: Mode = "sync"
    screen: bool = False
    fifo: bool = False
    passes: int = 1
    shapes: tuple[int, ...] = (24, 8, 4)
    """Completions per prompt that its tuning chooses from."""
    completions: int = COMPLETIONS
    shrunken: bool = False
    """The baseline of `objective.advantage = "shrunken"`, which groups of two can use."""
    trl: bool = False
    tuned_as: str = ""
    """The arm whose setting it uses; empty: it has a tuning of its own."""
    both_cores: bool = False
    """Two actors and two learner threads, so that generation and training, which alternate, each
    use both cores. Other arms give one core to the actor and one to the learner."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What tuning chooses for an arm."""

    lr: float
    clip: float
    """Maximum gradient norm. 1 rarely acts, 1/6 nearly always."""
    shape: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A deciding comparison. A name with * stands for the arm of that prefix with the best tuning
    score, followed by what comes after the *."""

    spread: str
    arm: str
    base: str
    endpoint: Endpoint
    aim: float
    """The ratio is to be at most this."""


LEARNING_RATES = (1e-4, 2e-4, 4e-4, 8e-4)
"""The lowest was added during the tuning at `real`, before any other seeds ran: asynchronous arms
with two passes had their best scores at 2e-4, then the lowest."""
CLIPS = (1.0, 1 / 6)
TRL_GRADIENT_SCALE = 6.0
"""TRL sums the loss of a completion over its tokens, six here, where the product takes the mean
over tokens. Its clip is scaled by this, so that equal settings clip equally."""
SCREENING_COMPLETIONS = {24: 4, 8: 4, 4: 2, 2: 1}


def factorial() -> dict[str, Arm]:
    """All arms of the factorial. Without a gate, alternating rounds generate exactly one batch, so
    there is nothing to order and `sync-rloo` has no first-in-first-out form."""
    arms = {}
    modes: tuple[Mode, ...] = ("sync", "async")
    for mode, screen, fifo, passes in product(modes, (False, True), (False, True), (1, 2)):
        if mode == "sync" and fifo and not screen:
            continue
        name = f"{mode}-{'speed' if screen else 'rloo'}{'-fifo' if fifo else ''}"
        name += f"-{passes}p" if passes > 1 else ""
        arms[name] = Arm(mode=mode, screen=screen, fifo=fifo, passes=passes)
    return arms


BASE = "sync-rloo-24"
BOTH_CORES = "-both-cores"
_FEW = Arm(completions=FEW_COMPLETIONS, shapes=(8, 4))
_TUNED: Mapping[str, Arm] = {
    BASE: Arm(shapes=(24,)),
    **factorial(),
    "sync-rloo-few": _FEW,
    "async-rloo-few": replace(_FEW, mode="async"),
    "async-rloo-few-shrunken": replace(_FEW, mode="async", shrunken=True, fifo=True, shapes=(4, 2)),
    "async-speed-few": replace(_FEW, mode="async", screen=True, shapes=(24, 8)),
    "trl-rloo": Arm(trl=True),
    "trl-rloo-few": replace(_FEW, trl=True),
}
ARMS: Mapping[str, Arm] = _TUNED | {
    f"{name}{BOTH_CORES}": replace(arm, tuned_as=name, both_cores=True)
    for name, arm in _TUNED.items()
    if name.startswith("sync-rloo")
}
"""Arms of `few` make an update of 96 completions. They were added after the first runs of the
factorial had shown that steps are what limits it, before any evaluation seed ran."""
_SCREENING_ARMS = (
    BASE,
    *(f"async-rloo{kind}" for kind in ("", "-2p", "-few", "-few-shrunken")),
    *(f"async-speed{kind}" for kind in ("", "-2p", "-few")),
)

SPREADS: Mapping[str, SpreadPlan] = {
    "real": SpreadPlan(
        spread=Spread(out_of_reach=0.35, hard=0.10, easy=0.20),
        targets=(0.50, 0.58),
        horizon_tokens=150_000,
        arms=tuple(ARMS),
    ),
    "hard": SpreadPlan(
        spread=Spread(out_of_reach=0.65, hard=0.15, easy=0.12, hard_below=0.02),
        targets=(0.264, 0.310),
        horizon_tokens=400_000,
        arms=_SCREENING_ARMS,
    ),
    "mild": SpreadPlan(
        spread=Spread(out_of_reach=0.0, hard=0.05, easy=0.05),
        targets=(0.70, 0.86),
        horizon_tokens=100_000,
        arms=_SCREENING_ARMS,
    ),
}
"""`real` follows DAPO-17k: 46 % of its prompts pass less than 5 % of the time for a 1.5B model, and
35 % still do for a 7B model. At `hard`, 80 % of the prompts pass less than 2 % of the time, and a
gate of 4 completions accepts 4.5 %.

The targets of `real` are 0.61 and 0.82 of the way from the initial accuracy, 0.27, to the
accuracy with every prompt within reach solved, 0.65. The other targets are at the same fractions:
from 0.13 to 0.35, and from 0.24 to 1."""

COMPARISONS: tuple[Comparison, ...] = (
    Comparison(spread="real", arm="async-*", base=BASE, endpoint="tokens", aim=0.4),
    Comparison(spread="real", arm="async-*", base="sync-rloo*", endpoint="tokens", aim=1.0),
    Comparison(spread="real", arm="async-*", base=BASE, endpoint="core_s", aim=1.0),
    *(
        Comparison(spread="real", arm=arm, base=base, endpoint="wall_s", aim=aim)
        for arm in ("async-*", "async-rloo-few")
        for base, aim in (
            (BASE, 0.33),
            (f"{BASE}{BOTH_CORES}", 0.33),
            ("sync-rloo*", 0.5),
            (f"sync-rloo*{BOTH_CORES}", 0.5),
            ("trl-rloo*", 0.2),
        )
    ),
    Comparison(spread="real", arm="async-speed*", base="async-rloo*", endpoint="tokens", aim=1.0),
    Comparison(spread="hard", arm="async-speed*", base="async-rloo*", endpoint="tokens", aim=0.4),
    Comparison(spread="mild", arm="async-speed*", base="async-rloo*", endpoint="tokens", aim=1.0),
)
"""Each is made at both targets, and all of them share one Holm correction. In seconds there are two
arms: `async-*` has the best score in tokens, which is that of `async-rloo-few-shrunken` so far, but
computes a gradient for every group, where plain RLOO skips those of equal rewards."""


def settings(arm: Arm) -> list[Setting]:
    """The grid that the tuning of an arm searches."""
    return [
        Setting(lr=lr, clip=clip, shape=shape)
        for lr, clip, shape in product(LEARNING_RATES, CLIPS, arm.shapes)
    ]


def checkpoint_every(arm: Arm) -> int:
    """Policy versions between scored checkpoints; a crossing is interpolated between two of them.
    They are 768 completions apart, and with a gate, which rejects most, half as many."""
    return (1 if arm.screen else 2) * COMPLETIONS // arm.completions


def overrides(arm: Arm, setting: Setting, seed: int) -> list[str]:
    """Overrides of the quickstart's configuration for one run."""
    n_init = SCREENING_COMPLETIONS[setting.shape]
    clip = setting.clip * (TRL_GRADIENT_SCALE if arm.trl else 1.0)
    values: dict[str, object] = {
        "algorithm": "speed-rloo" if arm.screen else "rloo",
        "run.seed": seed,
        "run.overlap": str(arm.mode == "async").lower(),
        "gate.n_init": n_init,
        "gate.n_cont": setting.shape - n_init,
        "actors.max_new_tokens": NUM_ANSWER_CHARACTERS + 1,
        "buffer.capacity_groups": 4 * COMPLETIONS,
        "learner.groups_per_update": arm.completions // setting.shape,
        "learner.lr": setting.lr,
        "learner.grad_clip": clip,
    }
    values["buffer.order"] = "arrival" if arm.fifo else "signal"
    if arm.both_cores:
        values |= {"cluster.actors": 2, "learner.num_threads": 2}
    if arm.shrunken:
        values["objective.advantage"] = "shrunken"
    if arm.passes > 1:
        values["learner.passes"] = arm.passes
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]
