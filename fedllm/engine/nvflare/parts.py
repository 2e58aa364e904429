"""Parts - a letter between server and site: facts as JSON and any number of byte strings, checked on arrival.

Small letters travel as one byte string. Larger ones are cut into pieces of 32 MiB, which FLARE streams singly (see
:mod:`fedllm.engine.nvflare.pieces`): a gigabyte in one piece makes the server hold ten. Every letter carries its sizes
and a SHA-256 of all it holds, made of those of its byte strings: audit logs need the same ones, and hashing a payload
takes longer than a copy of it.
"""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from fedllm.core.errors import DecodeError

if TYPE_CHECKING:
    from nvflare.apis.shareable import Shareable

    from fedllm.engine.nvflare.pieces import Piece

VERSION = 3
"""The version of what server and site say to each other; both sides need the same."""
PART = 32 * 2**20
"""Bytes of one part of a large letter."""
INLINE = 2**20
"""A letter up to so many bytes travels in one piece: the rounds of a stream would cost more."""
META_LIMIT = 64 * 2**20
"""The most bytes that the facts of a letter may take."""
BLOBS_LIMIT = 65_536
"""The most byte strings of one letter."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Ids of runs and names of legs: they become folders at the sites."""
RESERVED = re.compile(r"replies|worker\.log.*|audit\.jsonl.*")
"""Ids that no run may have: at a site, folders of runs lie beside these."""
_FACTS, _WHOLE, _PARTS = "fedllm", "fedllm_body", "fedllm_parts"


@dataclass(frozen=True)
class Letter:
    """What is said.

    Attributes:
        meta: facts that JSON can carry; `op` says what the letter is about.
        blobs: byte strings that the facts refer to by number.
        known: SHA-256 of each byte string, where its sender has it; None: it is computed when it is needed.
    """

    meta: dict[str, Any]
    blobs: Sequence[bytes] = field(default_factory=tuple)
    known: list[str] | None = field(default=None, compare=False, repr=False)

    @property
    def op(self) -> str:
        """What the letter is about."""
        return str(self.meta.get("op", ""))

    @cached_property
    def digests(self) -> list[str]:
        """SHA-256 of each byte string, in hexadecimal; computed once."""
        return [hashlib.sha256(blob).hexdigest() for blob in self.blobs] if self.known is None else self.known


def to_shareable(letter: Letter) -> Shareable:
    """The letter as FLARE carries it."""
    from nvflare.apis.shareable import Shareable

    found = Shareable()
    sizes = [len(blob) for blob in letter.blobs]
    facts = {"version": VERSION, "sizes": sizes, "sha256": digest(letter), "meta": letter.meta}
    found[_FACTS] = json.dumps(facts, allow_nan=False).encode()
    if sum(sizes) <= INLINE:
        found[_WHOLE] = b"".join(letter.blobs)
    else:
        found[_PARTS] = list(_cut(letter.blobs))
    return found


def from_shareable(shareable: MutableMapping[str, Any]) -> Letter:
    """The letter in what FLARE carried, taken out of it: FLARE holds on to that for as long as the letter is answered.

    Raises:
        DecodeError: the letter is not whole.
    """
    facts = _facts(shareable.get(_FACTS))
    body, parts = shareable.pop(_WHOLE, None), shareable.pop(_PARTS, None)
    if body is not None and not isinstance(body, bytes):
        raise DecodeError(f"The body of a letter is a {type(body).__name__}.", "Allowed: bytes, or a list of pieces.")
    pieces = _pieces(parts) if body is None else [memoryview(body)]
    sizes, came = cast("list[int]", facts["sizes"]), sum(len(piece) for piece in pieces)
    if sum(sizes) != came:
        raise DecodeError(f"A letter of {came} bytes arrived.", f"It says that it has {sum(sizes)}.")
    held = _shared_out(pieces, sizes)
    if came <= INLINE:
        letter = Letter(facts["meta"], [b"".join(one) for one in held])
    else:  # hashing and copying take as long as each other, and neither waits for Python
        with ThreadPoolExecutor(1) as pool:
            hashed = pool.submit(lambda: [_sha256(one) for one in held])
            letter = Letter(facts["meta"], [b"".join(one) for one in held], hashed.result())
    if digest(letter) != facts["sha256"]:
        raise DecodeError("A letter arrived damaged: its SHA-256 is not the one it was sent with.")
    return letter


def digest(letter: Letter) -> str:
    """SHA-256 over the facts and the lengths and SHA-256 of the byte strings."""
    facts = json.dumps(letter.meta, sort_keys=True).encode()
    found = hashlib.sha256(len(facts).to_bytes(8, "little") + facts)
    for blob, one in zip(letter.blobs, letter.digests, strict=True):
        found.update(len(blob).to_bytes(8, "little") + bytes.fromhex(one))
    return found.hexdigest()


def _facts(raw: object) -> dict[str, Any]:
    if not isinstance(raw, bytes) or len(raw) > META_LIMIT:
        size = f" of {len(raw)} bytes" if isinstance(raw, bytes) else ""
        raise DecodeError(f"The facts of a letter are a {type(raw).__name__}{size}.", "Allowed: bytes of JSON.")
    try:
        facts = json.loads(raw)
        version, sizes = facts["version"], facts["sizes"]
        whole = isinstance(facts["meta"], dict) and isinstance(facts["sha256"], str) and isinstance(sizes, list)
    except (ValueError, KeyError, TypeError, RecursionError) as fault:
        raise DecodeError(f"The facts of a letter cannot be read ({type(fault).__name__}).") from fault
    if version != VERSION:
        raise DecodeError(
            f"A letter of version {version!r} arrived.",
            f"This installation reads version {VERSION}.",
            action="Install the same version of fedllm on every side.",
        )
    if not whole or len(sizes) > BLOBS_LIMIT or not all(type(size) is int and size >= 0 for size in sizes):
        raise DecodeError("The facts of a letter are malformed.")
    return facts


def _cut(blobs: Sequence[bytes]) -> Iterator[Piece]:
    """Byte strings, one behind the other, in pieces of at most `PART` bytes: large ones as they lie."""
    small, held = list[bytes](), 0
    for blob in blobs:
        if held + len(blob) > PART or len(blob) > INLINE:
            yield from _parts(b"".join(small))
            small, held = [], 0
        if len(blob) > INLINE:
            yield from _parts(blob)
        else:
            small.append(blob)
            held += len(blob)
    yield from _parts(b"".join(small))


def _parts(data: bytes) -> Iterator[Piece]:
    from fedllm.engine.nvflare.pieces import Piece

    whole = memoryview(data)
    return (Piece(whole[start : start + PART]) for start in range(0, len(whole), PART))


def _pieces(parts: object) -> list[memoryview]:
    """The parts of a large letter, as they lie in memory."""
    from fedllm.engine.nvflare.pieces import Piece

    if not isinstance(parts, list | tuple):
        raise DecodeError("A letter has no body.")
    if not all(isinstance(part, Piece) for part in parts):
        raise DecodeError("A part of a letter is no piece.")
    return [memoryview(part.data) for part in cast("list[Piece]", parts)]


def _shared_out(pieces: Sequence[memoryview], sizes: Sequence[int]) -> list[list[memoryview]]:
    """What makes up byte strings of these sizes, of pieces that are as long together."""
    found, number, at = list[list[memoryview]](), 0, 0
    for size in sizes:
        taken, left = list[memoryview](), size
        while left:
            piece = pieces[number][at : at + left]
            taken.append(piece)
            left -= len(piece)
            at += len(piece)
            if at == len(pieces[number]):
                number, at = number + 1, 0
        found.append(taken)
    return found


def _sha256(pieces: Sequence[memoryview]) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()
