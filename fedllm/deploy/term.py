"""Term - from when to when a certificate is good, and how a time stands to that."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

SOON = timedelta(days=30)
"""How long before its end a certificate is spoken of."""


@dataclass(frozen=True)
class Term:
    """When a certificate is good, at a time.

    Attributes:
        begin: UTC.
        end: UTC.
        now: UTC.
    """

    begin: datetime
    end: datetime
    now: datetime

    @property
    def state(self) -> Literal["early", "good", "soon", "over"]:
        """Not good yet, good, good and ending within :data:`SOON`, or ended."""
        if self.now < self.begin:
            return "early"
        if self.now >= self.end:
            return "over"
        return "soon" if self.end - self.now < SOON else "good"

    @property
    def left(self) -> str:
        """How long it is good yet, in whole days."""
        days = (self.end - self.now).days
        return "less than a day" if days < 1 else "1 day" if days == 1 else f"{days} days"


def minute(time: datetime) -> str:
    """A time as it is shown: to the minute, in UTC."""
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
