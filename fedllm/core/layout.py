"""Layout - one safetensors file in memory: how tensors and a text become its bytes, and how they are cut out again.

The tensors of a part lie one behind the other, in the file and in memory after it was read, so that whoever adds up
what a thousand clients sent, or looks for a NaN in it, does so in one operation. Files of the same tensors have the
same layout: it is written once, and checked once, by the safetensors library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, deserialize

from fedllm.core.errors import ConfigError, DecodeError
from fedllm.core.tensors import Tensors, in_one_piece

HEADER_LIMIT = 64 * 1024 * 1024
"""The largest header accepted, in bytes; a header names every tensor."""
DIMS_LIMIT = 16
"""The most dimensions of a tensor that travels."""
REMEMBERED, REMEMBERED_BYTES = 64, 2**18
"""So many layouts are remembered, each of a header of at most so many bytes."""

_DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The number types as safetensors calls them, in the order in which it writes tensors."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}
DTYPES = frozenset(_NAMES)
"""What may travel. Complex numbers and 8-bit floats may not: no reducer can add them up or tell a NaN in them."""
_LEAD = b'{"__metadata__":{"fedllm":'

Form = tuple[tuple[str, torch.dtype, torch.Size], ...]
"""Names, number types and shapes of tensors."""


@dataclass(frozen=True)
class Layout:
    """Which tensors a file holds, and where.

    Attributes:
        pieces: number type, entries and first byte of each run of tensors of one part and type.
        parts: part -> for each of its tensors, by name: its name, piece, shape, strides and first entry there.
        sizes: part -> bytes of its tensors.
    """

    pieces: tuple[tuple[torch.dtype, int, int], ...]
    parts: Mapping[str, tuple[tuple[str, int, tuple[int, ...], tuple[int, ...], int], ...]]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> Layout:
        """The layout of a header that the library has accepted; ValueError or KeyError for what may not travel."""
        ordered = sorted((entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__")
        pieces: list[tuple[torch.dtype, int, int]] = []
        parts: dict[str, list[tuple[str, int, tuple[int, ...], tuple[int, ...], int]]] = {}
        sizes: dict[str, int] = {}
        last = None
        for (begin, end), full in ordered:
            dtype, shape = _DTYPES[header[full]["dtype"]], tuple(header[full]["shape"])
            if len(shape) > DIMS_LIMIT:
                raise ValueError(f"{len(shape)} dimensions")
            part, _, name = full.partition("/")
            if (part, dtype) != last:
                pieces.append((dtype, 0, begin))
                last = part, dtype
            _, entries, first = pieces[-1]
            parts.setdefault(part, []).append((name, len(pieces) - 1, shape, _strides(shape), entries))
            pieces[-1] = dtype, entries + math.prod(shape), first
            sizes[part] = sizes.get(part, 0) + end - begin
        return cls(tuple(pieces), {part: tuple(sorted(held)) for part, held in sorted(parts.items())}, sizes)

    def cut(self, data: bytes) -> dict[str, Tensors]:
        """Copies of a file's tensors, by part and name."""
        start = 8 + int.from_bytes(data[:8], "little")
        whole = [_piece(data, dtype, entries, start + first) for dtype, entries, first in self.pieces]
        return {
            part: {name: whole[piece].as_strided(shape, strides, at) for name, piece, shape, strides, at in held}
            for part, held in self.parts.items()
        }


_remembered: dict[tuple[bytes, int], Layout] = {}


def written(tensors: Mapping[str, torch.Tensor], text: str) -> bytes:
    """The bytes that safetensors writes for `tensors` and the metadata "fedllm": tests hold them equal.

    Formed in one copy (the library makes two): eight bytes of header length, the header as JSON padded with spaces to a
    multiple of eight, the tensors by the size of their numbers and then by name.

    Raises:
        ConfigError: a tensor that cannot travel.
    """
    names, rest = _rest(tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()))
    header = _LEAD + json.dumps(text, ensure_ascii=False).encode() + rest
    header += b" " * (-len(header) % 8)
    ordered = [tensors[name] for name in names]
    whole = in_one_piece(ordered) if len(ordered) > 1 else None
    apart = ordered if whole is None or whole.device.type != "cpu" else [whole]
    return b"".join([len(header).to_bytes(8, "little"), header, *map(_buffer, apart)])


def read(data: bytes) -> tuple[str, Layout]:
    """The text in a file's metadata and the layout of its tensors; raises :class:`DecodeError` for anything else."""
    if len(data) < 8:
        raise DecodeError(f"A message of {len(data)} bytes arrived.", "The shortest message has more than 8 bytes.")
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, HEADER_LIMIT):
        raise DecodeError(
            f"A message claims a header of {length} bytes and has {len(data) - 8}.",
            f"At most {HEADER_LIMIT} bytes are allowed.",
        )
    header = bytes(data[8 : 8 + length])
    text, rest = _apart(header)
    key = rest, len(data) - 8 - length
    if text is not None and key in _remembered:
        return text, _remembered[key]
    whole, layout = _checked(data, header)
    if text == whole and len(rest) <= REMEMBERED_BYTES and "__metadata__" not in json.loads(b"{" + rest[3:]):
        if len(_remembered) >= REMEMBERED:
            _remembered.clear()
        _remembered[key] = layout
    return whole, layout


def _apart(header: bytes) -> tuple[str | None, bytes]:
    """The text of a header as :func:`written` forms it, and what comes behind it; None for any other header.

    The text ends where its quotation mark does: before that, JSON has a backslash in front of each. Messages write
    their facts in ASCII; of any other text, the library judges whether it is one.
    """
    end = header.find(b'"},"')
    if end < 0 or not header.startswith(_LEAD):
        return None, b""
    try:
        text = json.loads(header[len(_LEAD) : end + 1].decode())
    except ValueError:
        return None, b""
    return (text, header[end:].rstrip(b" ")) if isinstance(text, str) and text.isascii() else (None, b"")


def _checked(data: bytes, header: bytes) -> tuple[str, Layout]:
    """The text and the layout of a file that was not seen before."""
    try:
        found = json.loads(header)
        text = found["__metadata__"]["fedllm"]
        if not isinstance(text, str):
            raise TypeError(f"metadata of type {type(text).__name__}")
    except (ValueError, KeyError, TypeError, RecursionError) as fault:
        raise DecodeError(f"The header of a message cannot be read ({type(fault).__name__}).") from fault
    try:
        deserialize(bytes(data))
        layout = Layout.of(found)
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError) as fault:
        raise DecodeError(f"The tensors of a message cannot be read ({type(fault).__name__}).") from fault
    return text, layout


@lru_cache(maxsize=REMEMBERED)
def _rest(form: Form) -> tuple[tuple[str, ...], bytes]:
    """The names in the order of the file, and what its header has behind the text."""
    for name, dtype, shape in form:
        if dtype not in DTYPES or len(shape) > DIMS_LIMIT:
            raise ConfigError(
                f"The tensor '{name}' is {dtype} in {len(shape)} dimensions and cannot travel.",
                f"Allowed: {', '.join(sorted(str(dtype) for dtype in DTYPES))}, at most {DIMS_LIMIT} dimensions.",
                action="Convert it first.",
            )
    ordered, entries, begin = sorted(form, key=lambda one: (_ORDER[one[1]], one[0])), dict[str, Any](), 0
    for name, dtype, shape in ordered:
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    rest = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return tuple(name for name, _, _ in ordered), b"}," + rest[1:] if entries else b"}}"


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Entries from one index to the next, of a tensor in one piece."""
    strides, step = list[int](), 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return tuple(strides)


def _piece(data: bytes, dtype: torch.dtype, entries: int, begin: int) -> torch.Tensor:
    """So many numbers from the byte `begin` on, copied."""
    whole = torch.empty(entries, dtype=dtype)
    if entries:
        whole.view(torch.uint8).numpy()[:] = numpy.frombuffer(data, numpy.uint8, whole.nbytes, begin)
    return whole


def _buffer(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in one piece; a copy only where it does not lie so on the CPU."""
    if not tensor.numel():
        return memoryview(b"")
    held = tensor.detach().to("cpu").contiguous()
    known = held if held.dtype != torch.bfloat16 else held.view(torch.int16)  # NumPy has no bfloat16
    return known.numpy().data.cast("B")
