"""Statistics over a sliding window. The caller passes the time, in seconds of a monotonic clock."""

from collections import deque
from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class WindowedRate:
    """Amount per second over the last `window_s` seconds, or since the start if that is less.

    Amounts are merged into steps of `window_s` / 64. This bounds memory, and the edge of the window
    is exact to one step. For bursty amounts use a window that covers several bursts.
    """

    window_s: float
    start_s: float
    amounts: deque[tuple[float, int | float]] = field(default_factory=deque)
    """Time of the first amount, and sum, of each step."""
    sum: int | float = 0

    def add(self, now_s: float, amount: float) -> None:
        if self.amounts and now_s - self.amounts[-1][0] < self.window_s / 64:
            first_s, merged = self.amounts[-1]
            self.amounts[-1] = (first_s, merged + amount)
        else:
            self.amounts.append((now_s, amount))
        self.sum += amount
        self._expire(now_s)

    def per_s(self, now_s: float) -> float | None:
        """Current rate; None if no time has passed."""
        self._expire(now_s)
        elapsed_s = min(self.window_s, now_s - self.start_s)
        return self.sum / elapsed_s if elapsed_s > 0 else None

    def _expire(self, now_s: float) -> None:
        while self.amounts and self.amounts[0][0] <= now_s - self.window_s:
            self.sum -= self.amounts.popleft()[1]
        if not self.amounts:
            self.sum = 0  # discard accumulated rounding errors


@dataclass(kw_only=True, slots=True)
class WindowedMean:
    """Mean and maximum of the last `num_values` values."""

    num_values: int
    values: deque[float] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.values = deque(self.values, maxlen=self.num_values)

    def add(self, value: float) -> None:
        self.values.append(value)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """None without values."""
        return sum(self.values) / len(self.values) if self.values else None

    @property
    def maximum(self) -> float | None:
        """None without values."""
        return max(self.values, default=None)
