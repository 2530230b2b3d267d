import pytest

from speed_async.learner.activity_times import ActivityTimes


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_each_second_counts_for_the_innermost_activity() -> None:
    clock = FakeClock()
    times = ActivityTimes(clock)
    with times.measure("wait"):
        clock.now_s += 1
    with times.measure("train"):
        clock.now_s += 2
        with times.measure("sync"):
            clock.now_s += 4
        clock.now_s += 8
    clock.now_s += 16  # no activity
    with times.measure("sync"):
        clock.now_s += 32
    assert times.take() == {
        "time/wait_s": 1,
        "time/train_s": 10,
        "time/sync_s": 36,
        "time/checkpoint_s": 0,
    }
    assert set(times.take().values()) == {0.0}


def test_an_activity_that_fails_is_counted() -> None:
    clock = FakeClock()
    times = ActivityTimes(clock)
    with pytest.raises(ValueError, match="full"), times.measure("checkpoint"):
        clock.now_s += 3
        raise ValueError("full")
    assert times.take()["time/checkpoint_s"] == 3
