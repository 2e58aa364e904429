"""Forecast - how long a round across sites takes over their lines, told before the run.

A round of a site is its work, the bytes of its letter and of its answer over the rate of its line, the growth of TCP's
window before a line is full, and a few times that one end waits for the other. What travels beside the tensors was
measured (`python -m benchmarks wan`). It says nothing of lines that lose packets or are shared with others.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fedllm.core.errors import ConfigError
from fedllm.engine.nvflare.job import POLL
from fedllm.engine.nvflare.parts import INLINE, PART

WINDOW = 14_600
"""Bytes that TCP sends before the first answer: ten segments (RFC 6928); after every answer, twice as many."""
TURNS = 4
"""How often in a round an end waits for the other over the line, whatever travels: a site's last result is confirmed
and its next question answered, which takes one and a half; it asks whether its result is still wanted, one; the result
travels, one half; and of several sites, the last one had just asked in vain, one."""
HEADERS = 0.055
"""Of TLS, TCP/IP and its confirmations, as a share of what they carry."""
BESIDE = 20_000
"""Bytes of a site and a round beside its tensors: the facts of two letters, FLARE's messages, questions for work."""
_RATE = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_LINE = re.compile(r"(?P<rate>\d+(?:\.\d+)?)(?P<unit>[kmg]bit),(?P<delay>\d+(?:\.\d+)?)ms", re.IGNORECASE)


@dataclass(frozen=True)
class Line:
    """A line between a site and the server.

    Attributes:
        rate: bits per second, in each direction.
        delay: seconds of one way.
    """

    rate: float
    delay: float

    @classmethod
    def of(cls, text: str) -> Line:
        """From `20mbit,50ms`; raises :class:`ConfigError` for any other text."""
        found = _LINE.fullmatch(text.replace(" ", ""))
        rate = float(found["rate"]) * _RATE[found["unit"].lower()] if found else 0.0
        if found is None or not rate:
            raise ConfigError(
                f"'{text}' is no line.",
                "A line is a rate (kbit, mbit or gbit a second) and a delay of one way in ms.",
                "20mbit,50ms",
            )
        return cls(rate, float(found["delay"]) / 1000)

    def __str__(self) -> str:
        return f"{self.rate / 1e6:g} Mbit/s and {1000 * self.delay:g} ms"

    def seconds(self, size: int) -> float:
        """For so many bytes to arrive, from a pause on: the window grows until the line is full."""
        there_and_back, window, sent, spent = 2 * self.delay, WINDOW, 0, 0.0
        while window * 8 < self.rate * there_and_back and sent + window < size:
            sent += window
            spent += there_and_back
            window *= 2
        return spent + (size - sent) * 8 / self.rate


def round_seconds(line: Line, down: int, up: int, work: float) -> float:
    """Of one round of a site.

    Args:
        line: between the site and the server.
        down: bytes that the site receives.
        up: bytes that it sends.
        work: seconds that its clients train, and that both ends encode and decode.
    """
    moved = sum(line.seconds(carried(size) - BESIDE // 2) for size in (down, up))
    beside = BESIDE * 8 / line.rate  # in small messages, each within a window
    return work + moved + beside + trips(down, up) * 2 * line.delay + POLL


def carried(size: int) -> int:
    """Bytes on the line for so many bytes of tensors, one way."""
    return round(size * (1 + HEADERS)) + BESIDE // 2


def trips(down: int, up: int) -> int:
    """How often in one round an end asks the other over the line and waits for the answer.

    A letter above `INLINE` is fetched by whom it is for: one question for each of its parts, and one that finds nothing
    more.
    """
    return TURNS + sum(math.ceil(size / PART) + 1 for size in (down, up) if size > INLINE)
