"""Given - values from files that others wrote, as the type that is needed or not at all; the page never trusts them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedllm.sites.policy import UniqueKeys

LONGEST = 2_000
"""Characters of a text that are shown."""
LARGEST = 64 * 1024 * 1024
"""Bytes of a file that is read whole."""


def number(value: object) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def whole(value: object) -> int | None:
    """A whole number from 0 to 2^53, which JavaScript can hold; None for anything else."""
    return value if type(value) is int and 0 <= value <= 2**53 else None


def text(value: object, longest: int = LONGEST) -> str:
    """A text, cut where it is too long; empty for what is no text, number or truth value."""
    if not isinstance(value, str | int | float):
        return ""
    found = str(value).encode("utf-8", "replace").decode()
    return found if len(found) <= longest else found[: longest - 1] + "…"


def texts(value: object) -> list[str]:
    """The texts in a list."""
    return [text(one) for one in listed(value) if text(one)]


def mapping(value: object) -> dict[str, Any]:
    """A mapping whose keys are texts; empty for anything else."""
    return {str(key): one for key, one in value.items()} if isinstance(value, Mapping) else {}


def listed(value: object) -> list[Any]:
    """A list; empty for anything else."""
    return list(value) if isinstance(value, list | tuple) else []


def parsed(line: bytes) -> dict[str, Any] | None:
    """A JSON object; None for anything else. NaN and infinities, which JSON does not have, become None."""
    try:
        found = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class File:
    """A small JSON or YAML file that is read again when it has changed.

    Args:
        path: the file; its ending decides how it is read.

    Attributes:
        found: its mapping; None where there is none.
        raw: its bytes; empty where there is none.
        changed: when it was written, seconds since 1970; 0.0 where there is none.
        damaged: whether it is there and holds no mapping.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] | None = None
        self.raw, self.changed, self.damaged = b"", 0.0, False
        self._seen: tuple[int, ...] | None = None

    def refresh(self) -> None:
        """Read it again where it has changed."""
        try:
            facts = self.path.stat()
            seen = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
            if seen == self._seen:
                return
            readable = self.path.is_file() and facts.st_size <= LARGEST
            self.raw, self.changed, self._seen = self.path.read_bytes() if readable else b"", facts.st_mtime, seen
        except OSError:
            self.raw, self.found, self.changed, self.damaged, self._seen = b"", None, 0.0, False, None
            return
        self.found = _yaml(self.raw) if self.path.suffix == ".yaml" else parsed(self.raw)
        self.damaged = self.found is None


def _yaml(data: bytes) -> dict[str, Any] | None:
    try:
        found = yaml.load(data.decode("utf-8"), Loader=UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return mapping(found) if isinstance(found, Mapping) else None
