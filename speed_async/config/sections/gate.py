"""`[gate]`: which prompts are continued, and the sizes of their groups."""

from typing import Literal

from speed_async.config.sections.section import Fraction, NonNegativeInt, PositiveInt, Section


class GateConfig(Section):
    mode: Literal["screen", "filter", "off"] = "screen"
    """`screen`: n_init completions first, and n_cont more if their pass rate is moderate (SPEED).
    `filter`: the whole group at once, kept if its pass rate is moderate (dynamic sampling of DAPO).
    `off`: every prompt gets a whole group, and every group is kept."""
    n_init: PositiveInt = 4
    """Screening completions per prompt."""
    n_cont: NonNegativeInt = 20
    """Continuation completions if the pass rate is moderate. The group size is n_init + n_cont in
    all modes."""
    low: Fraction = 0.0
    high: Fraction = 1.0
    """Moderate means low < pass rate < high, both strict."""

    @property
    def group_size(self) -> int:
        return self.n_init + self.n_cont

    @property
    def num_screening(self) -> int:
        """Completions of a group that the gate evaluates."""
        return {"screen": self.n_init, "filter": self.group_size, "off": 0}[self.mode]

    def admits(self, num_passed: int, num_screening: int) -> bool:
        """The decision of the gate on a prompt with these screening completions."""
        return self.low < num_passed / num_screening < self.high

    def is_pivotal(self, num_passed: int, num_screening: int, *, passed: bool) -> bool:
        """Whether the decision would be another one if one of these screening samples, which passed
        or failed, had the other outcome."""
        flipped = num_passed - 1 if passed else num_passed + 1
        return self.admits(flipped, num_screening) != self.admits(num_passed, num_screening)
