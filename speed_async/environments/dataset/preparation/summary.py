"""What `speed-async data prepare` prints."""

from speed_async.environments.dataset.preparation.card import contamination_lines, with_removed
from speed_async.environments.dataset.preparation.prepare import Prepared


def summary(prepared: Prepared) -> str:
    """The counts of each step, the rejected rows by reason, and the overlaps."""
    card, folder = prepared.card, prepared.folder
    rows = f"{card['output']['rows']:,} rows"
    if prepared.up_to_date:
        return f"{folder} is up to date ({rows})"
    lines = [f"{'removed':>10} {'left':>10}"]
    lines += [
        f"{removed:>10,} {step['num_rows']:>10,}  {step['name']}"
        for step, removed in with_removed(card["steps"])
    ]
    for reason, count in card["rejects"].items():
        lines.append(f"{'':23}{count:,} rejected: {reason}")
    lines += contamination_lines(card)
    return "\n".join([*lines, f"wrote {folder} ({rows}; see card.md)"])
