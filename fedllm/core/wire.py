"""Wire - the bytes of a message: one safetensors file whose metadata carries the typed structure.

Every engine sends exactly these bytes, so what is metered is what travels, and anyone can open a message with the
safetensors library. There is no pickle anywhere. Decoding treats the bytes as hostile: sizes are bounded before
anything is read, and every fault is a :class:`DecodeError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from fedllm.core.errors import ConfigError, DecodeError, FedLLMError
from fedllm.core.message import PARTS, Message, Received, Upload

VERSION = 1
HEADER_LIMIT = 64 * 1024 * 1024
"""The largest header accepted, in bytes; a header names every tensor."""
HELD_LIMIT = 64 * 1024 * 1024
"""The largest message of which a :class:`Decoder` keeps a copy, in bytes."""

_NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The number types as safetensors calls them, in the order in which it writes tensors."""
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}
DTYPES = frozenset(_NAMES)
"""What may travel. Complex numbers and 8-bit floats may not: no reducer can add them up or tell a NaN in them."""
DIMS_LIMIT = 16
"""The most dimensions of a tensor that travels."""

_CLASSES: dict[str, type[Message]] = {"message": Message, "received": Received, "upload": Upload}


def encode(message: Message) -> bytes:
    """The bytes of `message`; the same message always gives the same bytes.

    Raises:
        ConfigError: a part name, a tensor or a number that cannot travel.
    """
    tensors, text = _apart(message)
    return _file({name: _portable(name, tensor) for name, tensor in tensors.items()}, {"fedllm": text})


class Encoder:
    """Encodes one message after the other; one that says the same with the very same tensors has the very same bytes.

    So what many clients receive is formed once, and whoever counts or hashes it sees that it is one thing. It holds the
    last message's tensors: use it for one round of questions, and let it go.
    """

    def __init__(self) -> None:
        self._text, self._held, self._body = "", list[tuple[str, torch.Tensor, int]](), b""

    def __call__(self, message: Message) -> bytes:
        """See :func:`encode`."""
        tensors, text = _apart(message)
        if any(tensor.is_inference() for tensor in tensors.values()):
            return encode(message)  # nobody counts the changes of such a tensor
        held = [(name, tensor, tensor._version) for name, tensor in tensors.items()]
        if text != self._text or not _the_same(held, self._held):
            whole = {name: _portable(name, tensor) for name, tensor in tensors.items()}
            self._text, self._held, self._body = text, held, _file(whole, {"fedllm": text})
        return self._body


def _the_same(one: Sequence[tuple[str, torch.Tensor, int]], other: Sequence[tuple[str, torch.Tensor, int]]) -> bool:
    """Whether both are the very same tensors under the same names, unchanged since."""
    return len(one) == len(other) and all(
        a[0] == b[0] and a[1] is b[1] and a[2] == b[2] for a, b in zip(one, other, strict=True)
    )


def _apart(message: Message) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a message as they are, and everything else as JSON; raises as :func:`encode`."""
    tensors: dict[str, torch.Tensor] = {}
    parts: dict[str, Any] = {}
    for name, part in sorted(message.parts.items()):
        if not name or "/" in name or name == "header":
            raise ConfigError(f"A part cannot be called '{name}'.", "Allowed: any name without '/', but 'header'.")
        held, facts = part.to_wire()
        parts[name] = {"kind": part.kind, "facts": facts}
        tensors.update({f"{name}/{key}": t for key, t in held.items()})
    structure: dict[str, Any] = {
        "version": VERSION,
        "class": next((name for name, cls in _CLASSES.items() if cls is type(message)), None),
        "parts": parts,
        "numbers": message.numbers,
    }
    if isinstance(message, Upload):
        structure["weight"] = message.weight
        structure["metrics"] = {name: list(pair) for name, pair in message.metrics.items()}
    if structure["class"] is None:
        raise ConfigError(
            f"A message of class {type(message).__name__} cannot travel.", f"Allowed: {', '.join(_CLASSES)}."
        )
    return tensors, _json(structure)


def decode(data: bytes) -> Message:
    """The message in `data`; raises :class:`DecodeError` for anything that is not one."""
    return opened(data)[0]


def opened(data: bytes) -> tuple[Message, dict[str, int]]:
    """The message in `data` and its bytes by part (see :func:`size_by_part`); raises as :func:`decode`."""
    header, structure = _structure(data)
    return _built(structure, _tensors(data)), _sizes(len(data), header, structure)


class Decoder:
    """Decodes one body after the other; of the very same body it gives copies and does not read it again.

    So what many clients receive is read once, and none of them shares a tensor with another. It holds the last body:
    use it for one round of questions, and let it go. A large one is not held, but read each time.
    """

    def __init__(self) -> None:
        self._body, self._text, self._tensors = b"", "", dict[str, torch.Tensor]()

    def __call__(self, data: bytes) -> Message:
        """See :func:`decode`."""
        if len(data) > HELD_LIMIT:
            return decode(data)
        if data is not self._body:
            header, _ = _structure(data)
            self._body, self._text, self._tensors = data, header["__metadata__"]["fedllm"], _tensors(data)
        return _built(json.loads(self._text), {name: tensor.clone() for name, tensor in self._tensors.items()})


def size_by_part(data: bytes) -> dict[str, int]:
    """Bytes per part of an encoded message: of its tensors, or, where it has none, of its facts as JSON.

    A part without tensors (texts, scalars) lies in the file's header, but is no less what was sent. What is left of the
    file, names, weight, metrics and numbers, is under 'header'; all together are the whole file.
    """
    return _sizes(len(data), *_structure(data))


def _sizes(whole: int, header: dict[str, Any], structure: dict[str, Any]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            part = name.split("/", 1)[0]
            sizes[part] = sizes.get(part, 0) + end - start
    left = whole - sum(sizes.values())
    for name, entry in structure["parts"].items():
        if name not in sizes:
            sizes[name] = min(left, _length(entry.get("facts")))
            left -= sizes[name]
    return {**sizes, "header": left}


def _length(facts: Any) -> int:
    """Bytes of a part's facts; of what is nested too deeply to be written, none."""
    try:
        return 0 if facts is None else len(json.dumps(facts, sort_keys=True))
    except RecursionError:
        return 0


def _portable(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on the CPU in one piece; raises :class:`ConfigError` where it cannot travel."""
    if tensor.dtype not in DTYPES or tensor.dim() > DIMS_LIMIT:
        raise ConfigError(
            f"The tensor '{name}' is {tensor.dtype} in {tensor.dim()} dimensions and cannot travel.",
            f"Allowed: {', '.join(sorted(str(dtype) for dtype in DTYPES))}, at most {DIMS_LIMIT} dimensions.",
            action="Convert it first.",
        )
    return tensor.detach().to("cpu").contiguous()


def _json(structure: dict[str, Any]) -> str:
    try:
        return json.dumps(structure, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as fault:
        raise ConfigError(
            f"A message holds a value that cannot travel: {fault}.",
            "Allowed: None, bool, int, float, str, and lists and string-keyed dicts of these.",
            action="Convert NumPy numbers with int() or float().",
        ) from fault


def _file(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes that safetensors writes, formed in one copy (the library makes two): tests hold them equal.

    Eight bytes of header length, the header as JSON padded with spaces to a multiple of eight, the tensors by the size
    of their numbers and then by name.
    """
    ordered = sorted(tensors.items(), key=lambda pair: (_ORDER[pair[1].dtype], pair[0]))
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(_buffer(tensor) for _, tensor in ordered)])


def _buffer(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in one piece, without a copy."""
    if not tensor.numel():
        return memoryview(b"")
    known = tensor if tensor.dtype != torch.bfloat16 else tensor.view(torch.int16)  # NumPy has no bfloat16
    return known.numpy().data.cast("B")


def _structure(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header of a message, and what it says of it beside its tensors; both as JSON."""
    if len(data) < 8:
        raise DecodeError(f"A message of {len(data)} bytes arrived.", "The shortest message has more than 8 bytes.")
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, HEADER_LIMIT):
        raise DecodeError(
            f"A message claims a header of {length} bytes and has {len(data) - 8}.",
            f"At most {HEADER_LIMIT} bytes are allowed.",
        )
    try:
        header = json.loads(data[8 : 8 + length])
        structure = json.loads(header["__metadata__"]["fedllm"])
        version = structure["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as fault:
        raise DecodeError(f"The header of a message cannot be read ({type(fault).__name__}).") from fault
    if version != VERSION:
        raise DecodeError(
            f"A message of format version {version!r} arrived.",
            f"This installation reads version {VERSION}.",
            action="Install the same version of fedllm on every side.",
        )
    return header, structure


def _tensors(data: bytes) -> dict[str, torch.Tensor]:
    try:
        return load(bytes(data))
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, AssertionError) as fault:
        raise DecodeError(f"The tensors of a message cannot be read ({type(fault).__name__}).") from fault


def _built(structure: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Message:
    """The message; raises :class:`DecodeError` where its structure is none."""
    try:
        return _build(structure, tensors)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, FedLLMError) as fault:
        raise DecodeError(f"The structure of a message is malformed ({type(fault).__name__}: {fault}).") from fault


def _build(structure: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Message:
    by_part: dict[str, dict[str, torch.Tensor]] = {name: {} for name in structure["parts"]}
    for full, tensor in sorted(tensors.items()):  # the library gives them in a random order
        if tensor.dtype not in DTYPES or tensor.dim() > DIMS_LIMIT:
            raise ValueError(f"{tensor.dtype} in {tensor.dim()} dimensions")
        part, _, key = full.partition("/")
        by_part[part][key] = tensor
    parts = {
        name: PARTS[entry["kind"]].from_wire(by_part[name], entry["facts"])
        for name, entry in structure["parts"].items()
    }
    kind = _CLASSES[structure["class"]]
    numbers = {**structure["numbers"]}
    if kind is Upload:
        weight = float(structure["weight"])
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"weight {weight}")
        metrics = {str(k): (float(s), float(n)) for k, (s, n) in structure["metrics"].items()}
        upload = Upload(None, weight, metrics, numbers)
        upload.parts.update(parts)
        return upload
    message = kind()
    message.parts.update(parts)
    message.numbers.update(numbers)
    return message
