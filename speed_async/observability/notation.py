"""Human-readable formats of metric values. A missing value is shown as a dash, never an error."""

import math

from speed_async.observability.metrics import Value

DASH = "-"


def number_of(value: Value) -> float | None:
    """The value as a float; None if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def finite(value: Value) -> float | None:
    number = number_of(value)
    return number if number is not None and math.isfinite(number) else None


def duration(value: Value) -> str:
    """Seconds as `7s`, `1m02s`, `2h05m`, `3d04h`."""
    seconds = finite(value)
    if seconds is None:
        return DASH
    whole_s = max(0, round(seconds))
    minutes, rest_s = divmod(whole_s, 60)
    hours, rest_minutes = divmod(minutes, 60)
    days, rest_hours = divmod(hours, 24)
    if days:
        return f"{days}d{rest_hours:02d}h"
    if hours:
        return f"{hours}h{rest_minutes:02d}m"
    return f"{minutes}m{rest_s:02d}s" if minutes else f"{rest_s}s"


def count(value: Value) -> str:
    """A whole number of at most six characters: `5,300`, `99,999`, `123k`, `4.56M`."""
    number = number_of(value)
    if number is None or not math.isfinite(number):
        return DASH if number is None else str(number)
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= max(factor, 99_999.5):
            scaled = number / factor
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{suffix}"
    return f"{number:,.0f}"


def counted(value: Value, noun: str) -> str:
    """`1 update`, `2 updates`, `1,200 updates`."""
    number = number_of(value)
    return f"{DASH if number is None else f'{number:,.0f}'} {noun}{'' if number == 1 else 's'}"


def decimal(value: Value, places: int) -> str:
    number = number_of(value)
    return DASH if number is None else f"{number:.{places}f}"


def percent(value: Value) -> str:
    """A share in [0, 1] as `38 %`."""
    number = finite(value)
    return DASH if number is None else f"{100 * number:.0f} %"


def single_line(value: Value) -> str:
    """Text for one line of a terminal, without line breaks and control characters."""
    if value is None:
        return DASH
    printable = (char if char.isprintable() else " " for char in str(value))
    return " ".join("".join(printable).split())


def split_lines(value: Value) -> list[str]:
    """Split a text into non-empty lines, each sanitised for a terminal."""
    return [single_line(line) for line in str(value or "").splitlines() if line.strip()]


def shortened(value: Value, max_chars: int) -> str:
    """A single line of at most `max_chars` characters; longer text loses its middle."""
    text = single_line(value)
    num_last = (max_chars - 5) // 2
    if len(text) <= max_chars:
        return text
    return f"{text[: max_chars - 5 - num_last]} ... {text[-num_last:]}"
