"""Coded - the part that a codec makes of another part: one run of bytes, laid out by the settings and the shapes.

How many bytes a tensor takes follows from its shape and the codec's settings alone. So a decoder knows the exact
length before it reads, and no claim of a client makes it allocate more than it allows. The names, types and shapes
(the manifest) lie in the bytes too, where an entropy stage shrinks them with the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
import torch

from fedllm.core.errors import MissingExtra
from fedllm.core.layout import DIMS_LIMIT, DTYPES
from fedllm.core.message import Json, Part
from fedllm.core.tensors import Tensors

MANIFEST_LIMIT = 16 * 1024 * 1024
"""The largest manifest accepted, in bytes."""
BYTES_PER_ENTRY = 16
"""No codec writes more bytes for an entry: a float64 has 8, a scale or an index of its own 4."""
SIZE_LIMIT = 2**40
"""No dimension of a tensor is longer."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

Section = tuple[torch.dtype, int]
"""Type and length of one flat tensor in the bytes."""


class Coder(Protocol):
    """How one tensor becomes sections; without state."""

    def layout(self, shape: Sequence[int], dtype: torch.dtype) -> list[Section]:
        """The sections of a tensor of this shape and type."""
        ...

    def encode(self, values: torch.Tensor, dtype: torch.dtype, rng: numpy.random.Generator) -> list[torch.Tensor]:
        """`values` (finite, of `dtype` or wider) as the flat tensors that :meth:`layout` tells."""
        ...

    def decode(self, sections: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """What the sections stand for, in `shape`; raises ValueError for sections that no encoder makes."""
        ...


@dataclass(frozen=True)
class Raw:
    """A tensor as it is, or in another type.

    Args:
        dtype: the type it travels in; None for its own.
    """

    dtype: torch.dtype | None = None

    def layout(self, shape: Sequence[int], dtype: torch.dtype) -> list[Section]:
        """See :class:`Coder`."""
        return [(self.dtype or dtype, math.prod(shape))]

    def encode(self, values: torch.Tensor, dtype: torch.dtype, rng: numpy.random.Generator) -> list[torch.Tensor]:
        """See :class:`Coder`."""
        return [values.to(self.dtype or dtype).reshape(-1)]

    def decode(self, sections: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """See :class:`Coder`."""
        return sections[0].reshape(list(shape))


@dataclass(frozen=True)
class Coded(Part):
    """A part as bytes. No reducer takes it: it must be decoded first.

    Attributes:
        codes: uint8 [N].
        facts: `codec` (the settings that fix the layout) and `zstd` (whether the bytes are compressed).
    """

    kind = "coded"
    codes: torch.Tensor
    facts: dict[str, Json]

    def to_wire(self) -> tuple[Tensors, Json]:
        """The bytes and the facts."""
        return {"codes": self.codes}, self.facts

    @classmethod
    def from_wire(cls, tensors: Tensors, facts: Json) -> Coded:
        """See :class:`~fedllm.core.message.Part`."""
        if tensors.keys() != {"codes"} or tensors["codes"].dtype != torch.uint8 or tensors["codes"].dim() != 1:
            raise ValueError("a coded part is one vector of bytes")
        if not isinstance(facts, dict) or facts.keys() != {"codec", "zstd"} or not isinstance(facts["zstd"], bool):
            raise ValueError("a coded part names its codec and whether it is compressed")
        return cls(tensors["codes"], facts)


@dataclass(frozen=True)
class Entry:
    """One tensor of a manifest."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What was coded: the part's kind and facts, and its tensors in the order of their sections."""

    kind: str
    facts: Json
    entries: tuple[Entry, ...]

    @property
    def numel(self) -> int:
        """Entries of all its tensors."""
        return sum(math.prod(entry.shape) for entry in self.entries)

    def to_bytes(self) -> bytes:
        """Its length in four bytes, then JSON."""
        rows = [[e.name, str(e.dtype).removeprefix("torch."), list(e.shape)] for e in self.entries]
        text = json.dumps([self.kind, self.facts, rows], separators=(",", ":"), sort_keys=True).encode()
        return len(text).to_bytes(4, "little") + text

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The manifest in the JSON `data`; raises ValueError, TypeError or KeyError where it is malformed."""
        kind, facts, rows = json.loads(data, parse_constant=_refused)
        for name, _, shape in rows:
            sized = len(shape) <= DIMS_LIMIT and all(type(size) is int and 0 <= size < SIZE_LIMIT for size in shape)
            if type(name) is not str or not sized:
                raise ValueError("a tensor without a name or a shape")
        entries = tuple(Entry(name, _DTYPES[dtype], tuple(shape)) for name, dtype, shape in rows)
        if kind == Coded.kind or len({entry.name for entry in entries}) != len(entries):
            raise ValueError("a tensor that is named twice, or a part that is coded twice")
        return cls(kind, facts, entries)


def narrowed(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` in `dtype`; what float16 cannot hold becomes its largest number, not infinity."""
    if dtype is torch.float16 and values.dtype is not dtype:
        values = values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return values.to(dtype)


def _refused(constant: str) -> Any:
    raise ValueError(f"the number {constant}")


def joined(manifest: Manifest, sections: Sequence[torch.Tensor], planes: bool) -> torch.Tensor:
    """The manifest and the sections as bytes, uint8 [N].

    Args:
        manifest: what was coded.
        sections: flat tensors.
        planes: put the first bytes of all entries of a section first, then the second ones, ...: signs and exponents
            come to stand side by side, where an entropy coder finds what they have in common.
    """
    head = torch.frombuffer(bytearray(manifest.to_bytes()), dtype=torch.uint8)
    return torch.cat([head, *(_bytes(section, planes) for section in sections)])


def parted(codes: torch.Tensor) -> tuple[Manifest, torch.Tensor]:
    """The manifest, and the bytes after it; raises ValueError, TypeError or KeyError where it is malformed."""
    length = int.from_bytes(codes[:4].numpy().tobytes(), "little")
    if codes.numel() < 4 or length > min(codes.numel() - 4, MANIFEST_LIMIT):
        raise ValueError(f"a manifest of {length} bytes in {codes.numel()}")
    return Manifest.from_bytes(codes[4 : 4 + length].numpy().tobytes()), codes[4 + length :]


def cut(body: torch.Tensor, layout: Sequence[Section], planes: bool) -> list[torch.Tensor]:
    """The sections in `body`; raises ValueError unless they fill it exactly."""
    sizes = [count * dtype.itemsize for dtype, count in layout]
    if sum(sizes) != body.numel():
        raise ValueError(f"{body.numel()} bytes where {sum(sizes)} are needed")
    pieces = body.split(sizes) if sizes else ()
    return [_section(piece, dtype, planes) for piece, (dtype, _) in zip(pieces, layout, strict=True)]


def _bytes(section: torch.Tensor, planes: bool) -> torch.Tensor:
    flat, size = section.contiguous().view(torch.uint8), section.element_size()
    return flat.view(-1, size).t().reshape(-1) if planes and size > 1 else flat


def _section(piece: torch.Tensor, dtype: torch.dtype, planes: bool) -> torch.Tensor:
    if planes and dtype.itemsize > 1:
        turned = piece.view(dtype.itemsize, -1).t().clone(memory_format=torch.contiguous_format)
        return turned.view(-1).view(dtype)
    if dtype is torch.bool and piece.numel() and int(piece.max()) > 1:
        raise ValueError("a truth value that is neither 0 nor 1")
    return piece.clone().view(dtype)  # a copy begins where its type may begin


def compressed(codes: torch.Tensor, level: int) -> tuple[torch.Tensor, bool]:
    """`codes` by zstd with a checksum, and True; as they are, and False, where that is not shorter."""
    shrunk = zstd().ZstdCompressor(level=level, write_checksum=True).compress(codes.numpy())
    if len(shrunk) >= codes.numel():
        return codes, False
    return torch.frombuffer(bytearray(shrunk), dtype=torch.uint8), True


def expanded(codes: torch.Tensor, limit: int) -> torch.Tensor:
    """What :func:`compressed` shrank; raises ValueError for more than `limit` bytes or a damaged frame."""
    library, data = zstd(), codes.numpy().tobytes()
    try:
        size = library.get_frame_parameters(data).content_size
        if size > limit:  # also where the frame does not tell it
            raise ValueError(f"{size} bytes when expanded, and at most {limit} are allowed")
        found = library.ZstdDecompressor().decompress(data, max_output_size=limit, allow_extra_data=False)
    except library.ZstdError as fault:
        raise ValueError(f"a damaged zstd frame ({fault})") from fault
    return torch.frombuffer(bytearray(found), dtype=torch.uint8) if found else torch.empty(0, dtype=torch.uint8)


def zstd() -> Any:
    """The library; raises :class:`MissingExtra` where it is not installed."""
    try:
        import zstandard
    except ImportError:
        raise MissingExtra("zstandard", "codec", "codec.entropy=zstd") from None
    return zstandard
