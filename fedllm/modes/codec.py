"""Codec - uploads of fewer bytes, under any method.

A client encodes named parts of its upload just before the bytes are made; the server decodes them before anything
looks at them, so reducers, checks and defences see parts of the kinds, names, shapes and types that the method sent.

With error feedback the client keeps what a lossy code lost and adds it to its next upload: over the rounds nothing is
lost, only late. The engine keeps that memory in the client's private store and rolls it back with a refused upload.

Order with other modes: clip and noise, then the codec, then bytes. Masks and encryption need codes that add up; see
:attr:`Codec.linear`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence

import numpy
import torch

from fedllm.core.errors import ConfigError, FedLLMError, ModeConflict, UploadRejected
from fedllm.core.layout import DIMS_LIMIT, DTYPES
from fedllm.core.message import PARTS, Dense, Json, Owned, Part, Upload
from fedllm.core.tensors import Tensors, finite
from fedllm.modes.coded import (
    BYTES_PER_ENTRY,
    MANIFEST_LIMIT,
    Coded,
    Coder,
    Entry,
    Manifest,
    Raw,
    compressed,
    cut,
    expanded,
    joined,
    narrowed,
    parted,
    zstd,
)
from fedllm.modes.lowrank import LowRank
from fedllm.modes.quantise import Quantise, Sign
from fedllm.modes.settings import LARGEST, OPTIONS, CodecSettings
from fedllm.modes.sparsify import TopK

MEMORY = "codec.memory"
"""The name under which the engine keeps a client's residual in its private store."""
ROOM = 2**28
"""Entries of one part that are decoded where nothing says how many are expected (1 GiB of float32)."""

_FAULTS = (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RuntimeError, RecursionError)


class Codec(CodecSettings):
    """The settings, and what they do to an upload."""

    @property
    def step(self) -> float:
        """What one unit of an integer code is worth where `clip` is given."""
        return self._integers().step

    def word_bits(self, clients: int) -> int:
        """Bits of a word that holds the sum of so many integer codes, sign included."""
        return (2 * clients * self._integers().top).bit_length()

    def check(self, parts: Collection[str], secret: str | None = None) -> None:
        """Refuse, before a run, what cannot be.

        Args:
            parts: the parts that the method uploads (the names of its reducers).
            secret: the mode that forms sums in secret, if one does.

        Raises:
            ConfigError: a part that the method does not upload.
            ModeConflict: codes that do not add up under `secret`.
            MissingExtra: zstd is not installed.
        """
        if self.idle:
            return
        for name in self.parts:
            if name not in parts:
                raise ConfigError.unknown("part of this method's uploads", name, parts, "Change codec.parts.")
        if secret is not None and not self.linear:
            raise ModeConflict(
                f"codec.kind={self.kind} with codec.entropy={self.entropy} cannot be used under {secret}: codes of "
                "several clients do not add up.",
                "Codes that do: int8 or int4 with codec.clip and codec.entropy=none.",
                "int8" if self.kind != "int4" else None,
                "Set codec.clip to a bound of the entries, or remove the codec.",
            )
        if self.entropy == "zstd":
            zstd()

    @property
    def memory_name(self) -> str:
        """See :data:`MEMORY`."""
        return MEMORY

    def encode(
        self, upload: Upload, memory: Tensors | None, rng: numpy.random.Generator
    ) -> tuple[Upload, Tensors | None]:
        """At the client: `upload` with its parts encoded, and the new memory.

        Args:
            upload: what the method gave back; it is not changed.
            memory: what :meth:`encode` gave last time at this client; None at first. An entry whose tensor has
                another shape now, or another place in an owned part, is dropped.
            rng: a stream of this client and turn; clients that share one make the same rounding errors.

        Returns:
            The upload, and the memory to keep: `memory` itself where nothing was encoded, None where there is none.

        Raises:
            UploadRejected: a value that is not finite, or too large for a lossy code.
            ConfigError: a part that this codec cannot encode.
        """
        result = Upload(None, upload.weight, upload.metrics, upload.numbers)
        result.parts.update(upload.parts)
        for name in () if self.idle else self.parts:
            if name in upload.parts and upload.parts[name].to_wire()[0]:
                result.parts[name], memory = self._encoded(name, upload.parts[name], memory, rng, result)
        return result, memory

    def decode(self, upload: Upload, expected: Mapping[str, Tensors] | None = None) -> Upload:
        """At the server: `upload` with the parts that :meth:`encode` was given, or what is left of them.

        Args:
            upload: what arrived; parts that are not coded are passed on.
            expected: part -> the global tensors (a method's `expected`); a part with more entries is refused before
                anything is allocated. A part that is not named may have up to ``ROOM`` entries.

        Raises:
            UploadRejected: a part that is malformed, too large, not finite, or encoded with other settings.
        """
        result = Upload(None, upload.weight, upload.metrics, upload.numbers)
        for name, part in upload.parts.items():
            try:
                result.parts[name] = self._decoded(part, _room(expected, name)) if isinstance(part, Coded) else part
            except (FedLLMError, *_FAULTS) as fault:
                raise UploadRejected(f"The coded part '{name}' cannot be decoded: {fault}.") from fault
        return result

    def integers(self, part: Coded, expected: Tensors | None = None) -> Tensors:
        """The integer codes (int8) of a part that was encoded with `clip`: times :attr:`step` they are the tensors.

        Raises:
            ConfigError: a codec without `clip`.
            UploadRejected: see :meth:`decode`.
        """
        coder = self._integers()
        try:
            manifest, sections = self._opened(part, _room({"": expected} if expected is not None else None, ""))
            return {
                entry.name: coder.integers(found, math.prod(entry.shape)).reshape(entry.shape)
                for entry, found in zip(manifest.entries, sections, strict=True)
                if entry.dtype.is_floating_point
            }
        except _FAULTS as fault:
            raise UploadRejected(f"A coded part cannot be read: {fault}.") from fault

    def _encoded(
        self, name: str, part: Part, memory: Tensors | None, rng: numpy.random.Generator, result: Upload
    ) -> tuple[Coded, Tensors | None]:
        """The coded part and the new memory; the clipped share goes into the metrics of `result`."""
        self._takes(name, part)
        tensors, facts = part.to_wire()
        place, before = f"{name}/{_place(part)}/", memory or {}
        after = {key: held for key, held in before.items() if key.split("/", 1)[0] != name}
        entries: list[Entry] = []
        sections: list[torch.Tensor] = []
        clipped = total = 0
        for key in sorted(tensors):
            tensor = tensors[key].detach().to("cpu")
            coder = self._coder(tensor.shape, tensor.dtype)
            values = _summed(tensor, before.get(place + key), self.decay) if coder != Raw() else tensor
            _portable(f"{name}/{key}", values, None if coder == Raw() else LARGEST)
            found = coder.encode(values, tensor.dtype, rng)
            if self.feeds_back and coder != Raw():
                after[place + key] = values - narrowed(coder.decode(found, tensor.shape), tensor.dtype)
            if self.clip is not None and coder != Raw():
                clipped, total = clipped + int((values.abs() > self.clip).sum()), total + values.numel()
            entries.append(Entry(key, tensor.dtype, tuple(tensor.shape)))
            sections += found
        if self.clip is not None:
            result.metrics["codec_clipped"] = (float(clipped), float(total))
        codes = joined(Manifest(part.kind, facts, tuple(entries)), sections, self.entropy == "zstd")
        codes, smaller = compressed(codes, self.level) if self.entropy == "zstd" else (codes, False)
        return Coded(codes, {"codec": self._layout(), "zstd": smaller}), after or None

    def _decoded(self, part: Coded, room: int) -> Part:
        manifest, sections = self._opened(part, room)
        tensors = {
            e.name: narrowed(self._coder(e.shape, e.dtype).decode(found, e.shape), e.dtype)
            for e, found in zip(manifest.entries, sections, strict=True)
        }
        bad = finite(tensors)
        if bad is not None:
            raise ValueError(f"a value that is not finite in '{bad}'")
        result = PARTS[manifest.kind].from_wire(tensors, manifest.facts)
        self._takes(manifest.kind, result)
        return result

    def _opened(self, part: Coded, room: int) -> tuple[Manifest, list[list[torch.Tensor]]]:
        """The manifest, and the sections of each of its tensors."""
        planes = self.entropy == "zstd"
        if part.facts["codec"] != self._layout() or (part.facts["zstd"] and not planes):
            raise ValueError(f"it was encoded with other settings than {self._layout()}")
        codes = part.codes.to("cpu")
        if part.facts["zstd"]:
            codes = expanded(codes, room * BYTES_PER_ENTRY + MANIFEST_LIMIT)
        manifest, body = parted(codes)
        if manifest.numel > room:
            raise ValueError(f"{manifest.numel} entries, and at most {room} are expected")
        layouts = [self._coder(e.shape, e.dtype).layout(e.shape, e.dtype) for e in manifest.entries]
        flat = iter(cut(body, [section for layout in layouts for section in layout], planes))
        return manifest, [[next(flat) for _ in layout] for layout in layouts]

    def _coder(self, shape: Sequence[int], dtype: torch.dtype) -> Coder:
        """How a tensor of this shape and type travels."""
        if not dtype.is_floating_point or self.kind == "fp32":
            return Raw()
        if self.kind == "bf16":
            return Raw(torch.bfloat16 if dtype.itemsize > 2 else None)
        if self.kind == "topk":
            return TopK(self.density)
        if self.kind == "sign":
            return Sign()
        if self.kind == "lowrank":
            coder = LowRank(self.rank, self.iterations)
            return coder if coder.pays(shape, dtype) else Raw()
        return self._integers()

    def _integers(self) -> Quantise:
        if self.kind not in ("int8", "int4"):
            raise ConfigError(f"codec.kind={self.kind} makes no integers.", "int8 and int4 do.", "int8")
        return Quantise(8 if self.kind == "int8" else 4, self.block, self.rounding == "nearest", self.clip)

    def _layout(self) -> dict[str, Json]:
        """The settings that a decoder has to share."""
        used = [name for name in ("block", "clip", "density", "rank") if self.kind in OPTIONS[name]]
        return {"kind": self.kind, "entropy": self.entropy, **{name: getattr(self, name) for name in used}}

    def _takes(self, name: str, part: Part) -> None:
        """Raise :class:`ConfigError` for a part that this codec cannot encode."""
        if isinstance(part, Coded) or not (self.lossless or isinstance(part, Dense | Owned)):
            raise ConfigError(
                f"codec.kind={self.kind} cannot encode the part '{name}' of kind '{part.kind}'.",
                "A lossy code takes dense and owned parts; fp32 with codec.entropy=zstd takes any.",
                action=f"Remove '{name}' from codec.parts, or set codec.kind=fp32.",
            )


def _summed(tensor: torch.Tensor, residual: torch.Tensor | None, decay: float) -> torch.Tensor:
    """`tensor` in float32 or better, and what is left of earlier ones, where that has its shape."""
    values = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return values if residual is None or residual.shape != tensor.shape else values + decay * residual


def _portable(name: str, tensor: torch.Tensor, largest: float | None) -> None:
    """Raise where `tensor` cannot travel: not finite, beyond `largest`, or of a type that the bytes do not know."""
    if tensor.dtype not in DTYPES or tensor.dim() > DIMS_LIMIT:
        raise ConfigError(
            f"The tensor '{name}' is {tensor.dtype} in {tensor.dim()} dimensions and cannot travel.",
            f"Allowed: {', '.join(sorted(str(dtype) for dtype in DTYPES))}, at most {DIMS_LIMIT} dimensions.",
            action="Convert it first.",
        )
    if finite({name: tensor}) is not None:
        raise UploadRejected(f"The upload has a value that is not finite in '{name}': it cannot be encoded.")
    if largest is not None and tensor.numel() and float(tensor.abs().amax()) > largest:
        raise UploadRejected(
            f"The upload has a magnitude of {float(tensor.abs().amax()):.3g} in '{name}'.",
            f"A lossy code takes up to {largest:.0e}.",
        )


def _place(part: Part) -> str:
    """Where the tensors of a part lie: the same for all dense parts, a digest of the view for an owned one."""
    if not isinstance(part, Owned):
        return "all"
    indices, facts = part.view.to_wire()
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(indices):
        digest.update(name.encode() + indices[name].numpy().tobytes())
    return digest.hexdigest()[:16]


def _room(expected: Mapping[str, Tensors] | None, name: str) -> int:
    """The most entries of a part: the values and one index per dimension of what is expected."""
    if expected is None or name not in expected:
        return ROOM
    return sum(t.numel() + sum(t.shape) for t in expected[name].values())
