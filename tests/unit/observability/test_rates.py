import pytest

from speed_async.observability.rates import WindowedMean, WindowedRate


def test_rate_of_a_partial_window_uses_the_time_since_the_start() -> None:
    rate = WindowedRate(window_s=10.0, start_s=100.0)
    rate.add(102.0, 50)
    rate.add(104.0, 30)
    assert rate.per_s(104.0) == pytest.approx(80 / 4)


def test_amounts_outside_of_the_window_expire() -> None:
    rate = WindowedRate(window_s=10.0, start_s=0.0)
    for second in range(1, 21):
        rate.add(float(second), 7)
    # 11 to 20 are inside (10 is at the edge and outside): ten amounts over ten seconds.
    assert rate.per_s(20.0) == pytest.approx(7.0)
    assert rate.per_s(25.0) == pytest.approx(5 * 7 / 10)
    assert rate.per_s(30.0) == 0.0


def test_rate_without_elapsed_time_is_none() -> None:
    rate = WindowedRate(window_s=10.0, start_s=5.0)
    assert rate.per_s(5.0) is None
    rate.add(5.0, 100)
    assert rate.per_s(5.0) is None
    assert rate.per_s(15.1) == 0.0


def test_many_amounts_use_bounded_memory_and_keep_the_sum() -> None:
    rate = WindowedRate(window_s=64.0, start_s=0.0)
    for index in range(10_000):
        rate.add(index / 100, 1)  # 100 per second
    assert rate.per_s(99.99) == pytest.approx(100.0, rel=1 / 64)
    assert len(rate.amounts) <= 66


def test_mean_and_maximum_use_only_the_last_values() -> None:
    window = WindowedMean(num_values=4)
    assert (window.mean, window.maximum) == (None, None)
    for value in (9, 1, 0, 0, 1):
        window.add(value)
    assert (window.mean, window.maximum) == (0.5, 1)
