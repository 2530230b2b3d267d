"""Prompts that the model cannot process: their number, and the first reason."""

from dataclasses import dataclass, field

from speed_async.config.sections.evaluate import HELD_OUT


@dataclass(kw_only=True, slots=True)
class UnusablePrompts:
    """Each prompt counts once, regardless of how often it fails."""

    training: set[int] = field(default_factory=set)
    held_out: dict[str, set[int]] = field(default_factory=dict)
    """By suite."""
    first_training: str = ""
    first_held_out: str = ""

    @property
    def num_training(self) -> int:
        return len(self.training)

    @property
    def num_held_out(self) -> int:
        return sum(map(len, self.held_out.values()))

    def add(self, prompt_id: int, reason: str, *, suite: str = "") -> None:
        """`suite` is empty for a training prompt."""
        if not suite:
            self.training.add(prompt_id)
            self.first_training = self.first_training or f"prompt {prompt_id}: {reason}"
            return
        self.held_out.setdefault(suite, set()).add(prompt_id)
        of_suite = "" if suite == HELD_OUT else f" of {suite}"
        self.first_held_out = self.first_held_out or f"prompt {prompt_id}{of_suite}: {reason}"

    def describe(self) -> str:
        """Human-readable summary. Empty while every prompt is usable."""
        parts = []
        if self.training:
            parts.append(
                f"{_prompts(len(self.training), 'training')} cannot be used (left out); first "
                f"{self.first_training}"
            )
        if self.held_out:
            parts.append(
                f"{_prompts(self.num_held_out, 'held-out')} cannot be used (counted as not "
                f"passed); first {self.first_held_out}"
            )
        return "; ".join(parts)

    def describe_exhausted(self) -> str:
        """Why no training prompt is left."""
        return (
            f"no training prompt can be used: all {len(self.training)} of them failed; first "
            f"{self.first_training}"
        )


def _prompts(count: int, kind: str) -> str:
    return f"1 {kind} prompt" if count == 1 else f"{count} {kind} prompts"
