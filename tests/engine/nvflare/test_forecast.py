"""Forecast: rounds over lines, against sums by hand."""

from __future__ import annotations

import pytest

from fedllm.core.errors import ConfigError
from fedllm.engine.nvflare.forecast import BESIDE, TURNS, WINDOW, Line, carried, round_seconds, trips
from fedllm.engine.nvflare.job import POLL
from fedllm.engine.nvflare.parts import INLINE, PART

SLOW = Line(rate=20e6, delay=0.05)


def test_a_line_in_words():
    assert Line.of("20mbit,50ms") == SLOW == Line.of("0.02 Gbit, 50 ms")
    assert Line.of("512kbit,0ms") == Line(512e3, 0.0)
    assert str(SLOW) == "20 Mbit/s and 50 ms"


@pytest.mark.parametrize("text", ["", "20,50", "20mbit", "20mbps,50ms", "0mbit,5ms", "-1mbit,5ms", "20mbit,5s"])
def test_what_is_no_line_is_refused(text):
    with pytest.raises(ConfigError, match="20mbit,50ms"):
        Line.of(text)


def test_a_window_grows_until_the_line_is_full():
    assert SLOW.seconds(0) == 0
    assert SLOW.seconds(WINDOW) == 8 * WINDOW / 20e6  # all at once
    assert SLOW.seconds(3 * WINDOW) == pytest.approx(0.1 + 8 * 2 * WINDOW / 20e6)
    # 20 Mbit/s for 0.1 s are 250 kB: five windows (14.6 to 233.6 kB) go before the line is full
    assert SLOW.seconds(10_000_000) == pytest.approx(5 * 0.1 + 8 * (10_000_000 - 31 * WINDOW) / 20e6)
    assert Line(20e6, 0.0).seconds(10_000_000) == 4.0


def test_more_bytes_never_take_less():
    sizes = [SLOW.seconds(size) for size in range(0, 1_000_000, 997)]
    assert sizes == sorted(sizes)


def test_large_letters_are_fetched_part_by_part():
    assert trips(0, 0) == trips(INLINE, INLINE) == TURNS
    assert trips(INLINE + 1, 0) == TURNS + 2
    assert trips(PART + 1, PART) == TURNS + 3 + 2


def test_a_round_is_its_work_its_bytes_its_waiting_and_a_pause():
    assert carried(1_000_000) == 1_055_000 + BESIDE // 2
    assert BESIDE // 2 < WINDOW  # one window carries what is beside
    assert round_seconds(SLOW, 0, 0, 1.5) == pytest.approx(1.5 + 8 * BESIDE / 20e6 + TURNS * 0.1 + POLL)
    large = 2 * SLOW.seconds(10_550_000) + 8 * BESIDE / 20e6 + (TURNS + 2 + 2) * 0.1 + POLL
    assert round_seconds(SLOW, 10_000_000, 10_000_000, 0) == pytest.approx(large)
