"""Wire - the bytes of a message: one safetensors file whose metadata carries the typed structure.

Every engine sends exactly these bytes, so what is metered is what travels, and anyone can open a message with the
safetensors library. Nothing in it is unpickled. Decoding treats the bytes as hostile: sizes are bounded before
anything is read, and every fault is a :class:`DecodeError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from fedllm.core.errors import ConfigError, DecodeError, FedLLMError
from fedllm.core.layout import Layout, read, written
from fedllm.core.message import PARTS, Message, Received, Upload
from fedllm.core.tensors import Tensors

VERSION = 1

_CLASSES: dict[str, type[Message]] = {"message": Message, "received": Received, "upload": Upload}


def encode(message: Message) -> bytes:
    """The bytes of `message`; the same message always gives the same bytes.

    Raises:
        ConfigError: a part name, a tensor or a number that cannot travel.
    """
    return written(*_apart(message))


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
            self._text, self._held, self._body = text, held, written(tensors, text)
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
    text, layout = read(data)
    structure = _structure(text)
    try:
        message = _build(structure, layout.cut(data))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, FedLLMError) as fault:
        raise DecodeError(f"The structure of a message is malformed ({type(fault).__name__}: {fault}).") from fault
    return message, _sizes(len(data), layout, structure)


def size_by_part(data: bytes) -> dict[str, int]:
    """Bytes per part of an encoded message: of its tensors, or, where it has none, of its facts as JSON.

    A part without tensors (texts, scalars) lies in the file's header, but is no less what was sent. What is left of the
    file, names, weight, metrics and numbers, is under 'header'; all together are the whole file.
    """
    text, layout = read(data)
    return _sizes(len(data), layout, _structure(text))


def _sizes(whole: int, layout: Layout, structure: dict[str, Any]) -> dict[str, int]:
    sizes = dict(layout.sizes)
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


def _json(structure: dict[str, Any]) -> str:
    try:
        return json.dumps(structure, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as fault:
        raise ConfigError(
            f"A message holds a value that cannot travel: {fault}.",
            "Allowed: None, bool, int, float, str, and lists and string-keyed dicts of these.",
            action="Convert NumPy numbers with int() or float().",
        ) from fault


def _structure(text: str) -> dict[str, Any]:
    """What a message says beside its tensors."""
    try:
        structure = json.loads(text)
        version = structure["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as fault:
        raise DecodeError(f"The header of a message cannot be read ({type(fault).__name__}).") from fault
    if version != VERSION:
        raise DecodeError(
            f"A message of format version {version!r} arrived.",
            f"This installation reads version {VERSION}.",
            action="Install the same version of fedllm on every side.",
        )
    return structure


def _build(structure: dict[str, Any], tensors: dict[str, Tensors]) -> Message:
    stray = next((name for name in tensors if name not in structure["parts"]), None)
    if stray is not None:
        raise ValueError(f"tensors of '{stray}', which is no part")
    parts = {
        name: PARTS[entry["kind"]].from_wire(tensors.get(name, {}), entry["facts"])
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
