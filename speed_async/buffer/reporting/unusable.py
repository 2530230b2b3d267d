"""Prompts that the model cannot process: their number, and the first reason."""


class UnusablePrompts:
    """Each prompt counts once, regardless of how often it fails."""

    def __init__(self) -> None:
        self._training: set[int] = set()
        self._held_out: set[int] = set()
        self._first_training = ""
        self._first_held_out = ""

    @property
    def num_training(self) -> int:
        return len(self._training)

    @property
    def num_held_out(self) -> int:
        return len(self._held_out)

    def add(self, prompt_id: int, reason: str, *, training: bool) -> None:
        example = f"prompt {prompt_id}: {reason}"
        if training:
            self._training.add(prompt_id)
            self._first_training = self._first_training or example
        else:
            self._held_out.add(prompt_id)
            self._first_held_out = self._first_held_out or example

    def describe(self) -> str:
        """Human-readable summary. Empty while every prompt is usable."""
        parts = []
        if self._training:
            parts.append(
                f"{_prompts(len(self._training), 'training')} cannot be used (left out); first "
                f"{self._first_training}"
            )
        if self._held_out:
            parts.append(
                f"{_prompts(len(self._held_out), 'held-out')} cannot be used (counted as not "
                f"passed); first {self._first_held_out}"
            )
        return "; ".join(parts)

    def describe_exhausted(self) -> str:
        """Why no training prompt is left."""
        return (
            f"no training prompt can be used: all {len(self._training)} of them failed; first "
            f"{self._first_training}"
        )


def _prompts(count: int, kind: str) -> str:
    return f"1 {kind} prompt" if count == 1 else f"{count} {kind} prompts"
