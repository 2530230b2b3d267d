"""Samples on the panel: prompt, completion and reward."""

from collections.abc import Mapping

from rich.text import Text

from speed_async.observability.metrics import Value
from speed_async.observability.notation import DASH, count, decimal, single_line
from speed_async.observability.panel.layout import LABEL, Layout, without_middle, wrapped
from speed_async.observability.panel.state import PanelState

NO_SAMPLES = "no sample yet: completions are sampled periodically once actors run"
INDENT = LABEL + 1
EXTRA_LINES = 3
"""Lines of a sample besides prompt and completion: header, extracted answer, blank line."""


def samples_view(state: PanelState, layout: Layout, height: int | None) -> list[Text]:
    """The latest samples, newest first, in at most `height` lines. Long texts lose their
    middle, and older samples are omitted if there is not enough space."""
    samples = list(reversed(state.samples))
    if not samples:
        return [Text(NO_SAMPLES, "dim")]
    if height is not None:
        samples = samples[: max(1, height // (EXTRA_LINES + 2))]
    each = None if height is None else height // len(samples)
    lines: list[Text] = []
    for sample in samples:
        lines += sample_lines(sample, layout, each)
    return lines[:-1] if height is None else lines[: min(height, len(lines) - 1)]


def sample_lines(sample: Mapping[str, Value], layout: Layout, height: int | None) -> list[Text]:
    """One sample in at most `height` lines, including a blank line at the end."""
    max_lines = None if height is None else max(2, height - EXTRA_LINES)
    prompt = _lines("prompt", sample.get("prompt"), layout)
    completion = _lines("completion", sample.get("completion"), layout)
    if max_lines is not None:
        num_prompt = min(len(prompt), max(1, max_lines // 3, max_lines - len(completion)))
        prompt = without_middle(prompt, num_prompt)
        completion = without_middle(completion, max_lines - len(prompt))
    answer = sample.get("extracted")
    extracted = Text(single_line(answer) if answer is not None else f"{DASH} (no answer found)")
    lines = [_header(sample), *(Text(line) for line in (*prompt, *completion))]
    answer_row = Text("extracted".ljust(INDENT)).append_text(extracted)
    return [*lines, answer_row, Text()]


def _lines(label: str, value: Value, layout: Layout) -> list[str]:
    text = single_line(value) if value not in (None, "") else "(empty)"
    return wrapped(text, layout.inner, first=label.ljust(INDENT), rest=" " * INDENT)


def _header(sample: Mapping[str, Value]) -> Text:
    reward = sample.get("reward")
    head = Text("reward ", "bold").append(decimal(reward, 2), "bold")
    if sample.get("truncated") is True:
        head.append("  TRUNCATED", "bold red")
    facts = [
        single_line(sample.get("decision")),
        f"v{decimal(sample.get('policy_version'), 0)}",
        f"prompt {single_line(sample.get('prompt_id'))}",
        single_line(sample.get("actor")),
        f"{count(sample.get('num_tokens'))} tokens",
    ]
    for fact in facts:
        head.append(f"  {fact}", "dim")
    if sample.get("held_out") is True:
        head.append("  held-out", "dim")
    return head
