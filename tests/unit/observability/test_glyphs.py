import pytest

from speed_async.observability.notation import count, duration, single_line
from speed_async.observability.panel.glyphs import bar, resample, sparkline, stacked_bar


def test_columns_are_means_and_gaps_repeat_the_previous_value() -> None:
    points = [(-1.0, 5.0), (2.5, 1.0), (3.5, 3.0), (9.9, 8.0)]
    # Columns of 2 s: nothing, 1 and 3, nothing, nothing, 8.
    assert resample(points, 5, from_s=0.0, to_s=10.0) == [5.0, 2.0, 2.0, 2.0, 8.0]
    assert resample(points[1:], 5, from_s=0.0, to_s=10.0)[0] is None


def test_sparkline_spans_all_levels() -> None:
    points = [(float(index), float(index)) for index in range(8)]
    assert sparkline(points, 8, from_s=0.0, to_s=8.0, low=0.0, high=8.0) == "▁▂▃▄▅▆▇█"
    assert sparkline(points, 8, from_s=0.0, to_s=8.0, low=0.0, high=0.0) == "▁▁▁▁▁▁▁▁"
    assert sparkline([], 4, from_s=0.0, to_s=0.0, low=0.0, high=1.0) == "    "


def test_bars_fill_by_share_and_stacks_never_overflow() -> None:
    assert bar(0.25, 8, "").plain == "━━──────"
    assert bar(0.001, 8, "").plain == "━───────"
    assert bar(7.0, 4, "").plain == "━━━━"
    assert bar(None, 4, "").plain == "────"
    styles = [""] * 5
    assert stacked_bar([0.5, 0.2, 0.1, 0.1, 0.1], styles, 10).plain == "█████▓▓▒░▚"
    assert stacked_bar([0.5, None, None, None, None], styles, 8).plain == "████────"
    assert len(stacked_bar([0.35] * 5, styles, 10).plain) == 10


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (5300.4, "5,300"), (99_999, "99,999"), (123_400, "123k"), (4.561e6, "4.56M")],
)
def test_counts_stay_short(value: float, text: str) -> None:
    assert count(value) == text


def test_durations_choose_their_unit() -> None:
    assert [duration(s) for s in (0, 59.6, 62, 7500, 273_600, None, "x", float("inf"))] == [
        *("0s", "1m00s", "1m02s", "2h05m", "3d04h"),
        *("-", "-", "-"),
    ]


def test_control_characters_are_removed() -> None:
    assert single_line("a\x1b[31m\r\nb\x07") == "a [31m b"
