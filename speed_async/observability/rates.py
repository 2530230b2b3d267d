"""Statistics over a sliding window. The caller passes the time, in seconds of a monotonic clock."""

from collections import deque


class WindowedRate:
    """Amount per second over the last `window_s` seconds, or since the start if that is less.

    Amounts are merged into steps of `window_s` / 64. This bounds memory, and the edge of the window
    is exact to one step. For bursty amounts use a window that covers several bursts.
    """

    def __init__(self, *, window_s: float, start_s: float) -> None:
        self._window_s = window_s
        self._start_s = start_s
        self._step_s = window_s / 64
        self._amounts: deque[tuple[float, float]] = deque()  # (time of first amount, sum)
        self._sum = 0.0

    def add(self, now_s: float, amount: float) -> None:
        if self._amounts and now_s - self._amounts[-1][0] < self._step_s:
            first_s, merged = self._amounts[-1]
            self._amounts[-1] = (first_s, merged + amount)
        else:
            self._amounts.append((now_s, amount))
        self._sum += amount
        self._expire(now_s)

    def per_s(self, now_s: float) -> float | None:
        """Current rate; None if no time has passed."""
        self._expire(now_s)
        elapsed_s = min(self._window_s, now_s - self._start_s)
        return self._sum / elapsed_s if elapsed_s > 0 else None

    def _expire(self, now_s: float) -> None:
        while self._amounts and self._amounts[0][0] <= now_s - self._window_s:
            self._sum -= self._amounts.popleft()[1]
        if not self._amounts:
            self._sum = 0.0  # discard accumulated rounding errors


class WindowedMean:
    """Mean and maximum of the last `num_values` values."""

    def __init__(self, *, num_values: int) -> None:
        self._values: deque[float] = deque(maxlen=num_values)

    def add(self, value: float) -> None:
        self._values.append(value)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def mean(self) -> float | None:
        """None without values."""
        return sum(self._values) / len(self._values) if self._values else None

    @property
    def maximum(self) -> float | None:
        """None without values."""
        return max(self._values, default=None)
