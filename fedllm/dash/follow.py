"""Follow - a file of lines that grows: each poll reads on where the one before stopped, and no longer than it may."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import BinaryIO

LINE_LIMIT = 16 * 1024 * 1024
"""Bytes of a line at most; a longer one is left out."""
MARK = 64
"""Bytes before the place that was reached; where they differ now, the file is another one and is read anew."""


class Follower:
    """Reads a growing file line by line; a subclass says what a line means.

    Args:
        path: the file, which need not exist yet.

    Attributes:
        offset: bytes read.
        size: bytes there were when it was last looked at.
        changed: when it was last written, seconds since 1970; 0.0 where there is none.
        at_end: whether all whole lines have been read.
    """

    limit = LINE_LIMIT

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = self.size = 0
        self.changed, self.at_end = 0.0, True
        self._place, self._mark, self._inside = (0, 0), b"", False
        self.clear()

    def clear(self) -> None:
        """Forget what lines said: the file is another one."""

    def take(self, line: bytes) -> None:
        """A whole line, its end included."""

    def too_long(self) -> None:
        """A line that is longer than `limit`, of which nothing is taken."""

    @property
    def rest(self) -> int:
        """Bytes at the end that are no whole line: one is being written, or a crash cut it."""
        return self.size - self.offset if self.at_end else 0

    def refresh(self, until: float) -> bool:
        """Read on until the end of the file or the time `until` (`time.monotonic`); True at the end."""
        try:
            if not self.path.is_file():  # a pipe would block for ever
                raise FileNotFoundError(self.path)
            with self.path.open("rb") as file:
                self.at_end = self._read(file, until)
        except OSError:
            if self.offset:
                self._again()
            self.size, self.changed, self.at_end = 0, 0.0, True
        return self.at_end

    def _read(self, file: BinaryIO, until: float) -> bool:
        facts = os.fstat(file.fileno())
        place = facts.st_dev, facts.st_ino
        if self.offset and (place != self._place or facts.st_size < self.offset or not self._same(file)):
            self._again()
        self._place, self.size, self.changed = place, facts.st_size, facts.st_mtime
        file.seek(self.offset)
        while True:
            line = file.readline(self.limit)
            whole = line.endswith(b"\n")
            if not whole and len(line) < self.limit:
                self.size = max(self.size, self.offset + len(line))
                return True
            self._take(line, whole)
            if time.monotonic() > until:
                return self.offset >= self.size

    def _take(self, line: bytes, whole: bool) -> None:
        self.offset += len(line)
        self._mark = (self._mark + line)[-MARK:] if len(line) < MARK else line[-MARK:]
        if not self._inside and whole:
            self.take(line)
        elif not self._inside:
            self.too_long()
        self._inside = not whole

    def _same(self, file: BinaryIO) -> bool:
        file.seek(self.offset - len(self._mark))
        return file.read(len(self._mark)) == self._mark

    def _again(self) -> None:
        self.offset, self._mark, self._inside = 0, b"", False
        self.clear()
