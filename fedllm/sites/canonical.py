"""Canonical - one form of JSON, so that equal values have equal bytes, which can be hashed and signed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from fedllm.core.errors import DecodeError

NAME = r"[A-Za-z0-9][A-Za-z0-9._@+/:-]{0,127}"
"""A name of a run, a site, a person, a client or a method: no spaces, so that no text can pass for one."""
LABEL = r"[A-Za-z0-9][A-Za-z0-9 ._@+/:()-]{0,127}"
"""A name that people chose: a purpose, a data set, a licence."""
SHA256 = r"[0-9a-f]{64}"


def canonical(value: Any) -> bytes:
    """`value` as JSON in ASCII: sorted keys, no spaces, no NaN.

    Raises:
        DecodeError: what is not JSON, or nested too deeply.
    """
    try:
        return _ENCODER.encode(value).encode("ascii")
    except (TypeError, ValueError, RecursionError) as fault:
        raise DecodeError(f"A value cannot be written as JSON: {fault}.") from None


def parsed(data: bytes) -> Any:
    """The value in `data`, which is JSON in UTF-8, of any form.

    Raises:
        DecodeError: not JSON, nested too deeply, a key that stands twice, or a number that is not finite.
    """
    try:
        return _DECODER.decode(data.decode("utf-8"))
    except (ValueError, RecursionError) as fault:
        raise DecodeError(f"Bytes that should be JSON are not: {fault}.") from None


def sha256(value: Any) -> str:
    """SHA-256 of the canonical form, in hexadecimal."""
    return hashlib.sha256(canonical(value)).hexdigest()


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _finite(word: str) -> float:
    raise ValueError(f"{word} is not a finite number")


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_finite)
