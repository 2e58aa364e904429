"""Compress - what a difference of tensors is sent as: its largest entries, its signs, small integers.

Each compressor keeps a share of the difference's energy, which is what CHOCO needs of one (Koloskova et al., ICML 2019,
arXiv:1902.00340, assumption 1). Whatever cannot be the code of tensors of the shapes at hand is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import numpy
import torch

from fedllm.core.errors import ConfigError, UploadRejected
from fedllm.core.tensors import Tensors, same_shapes, zeros


class Compressor(Protocol):
    """C of CHOCO: what travels in place of a difference, and what it stands for."""

    def encode(self, difference: Tensors, rng: numpy.random.Generator) -> Tensors:
        """The tensors that travel."""
        ...

    def decode(self, sent: Tensors, like: Tensors) -> Tensors:
        """The difference they stand for, in the shapes of `like`; raises :class:`UploadRejected` for anything else."""
        ...


class Identity:
    """Everything, as it is."""

    def encode(self, difference: Tensors, rng: numpy.random.Generator) -> Tensors:
        """See :class:`Compressor`."""
        return difference

    def decode(self, sent: Tensors, like: Tensors) -> Tensors:
        """See :class:`Compressor`."""
        same_shapes(sent, like, "A message")
        return sent


class TopK:
    """The `fraction` of each tensor's entries that is largest: values and their places (int32)."""

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def encode(self, difference: Tensors, rng: numpy.random.Generator) -> Tensors:
        """See :class:`Compressor`."""
        found: Tensors = {}
        for name, tensor in difference.items():
            flat = tensor.flatten()
            places = flat.abs().topk(math.ceil(self.fraction * flat.numel())).indices.sort().values
            found[f"places.{name}"], found[f"values.{name}"] = places.to(torch.int32), flat[places]
        return found

    def decode(self, sent: Tensors, like: Tensors) -> Tensors:
        """See :class:`Compressor`."""
        found = zeros(like)
        for name, tensor in found.items():
            places, values = _taken(sent, f"places.{name}").long(), _taken(sent, f"values.{name}")
            count = math.ceil(self.fraction * tensor.numel())
            fits = places.shape == values.shape == (count,) and bool((places.diff() > 0).all())
            if not fits or (count and not 0 <= int(places[0]) <= int(places[-1]) < tensor.numel()):
                raise UploadRejected(f"'{name}' is not {count} ascending places of {tensor.numel()} and their values.")
            tensor.view(-1)[places] = values.to(tensor.dtype)
        return found


class Sign:
    """One bit per entry and the mean magnitude of each tensor."""

    def encode(self, difference: Tensors, rng: numpy.random.Generator) -> Tensors:
        """See :class:`Compressor`."""
        found: Tensors = {}
        for name, tensor in difference.items():
            bits = numpy.packbits((tensor.flatten() > 0).numpy())
            found[f"bits.{name}"] = torch.from_numpy(bits)
            found[f"scale.{name}"] = tensor.abs().mean().reshape(1)
        return found

    def decode(self, sent: Tensors, like: Tensors) -> Tensors:
        """See :class:`Compressor`."""
        found = {}
        for name, tensor in like.items():
            bits, scale = _taken(sent, f"bits.{name}"), _taken(sent, f"scale.{name}")
            if bits.dtype != torch.uint8 or bits.shape != (-(-tensor.numel() // 8),) or scale.shape != (1,):
                raise UploadRejected(f"The signs of '{name}' are not one bit for each of {tensor.numel()} entries.")
            signs = torch.from_numpy(numpy.unpackbits(bits.numpy(), count=tensor.numel())).to(scale.dtype) * 2 - 1
            found[name] = (signs * scale).view(tensor.shape)
        return found


class Quantise:
    """Whole numbers of `bits` bits (4 or 8) in steps of each tensor's largest magnitude, rounded at random."""

    def __init__(self, bits: int) -> None:
        self.bits, self.levels = bits, 2 ** (bits - 1) - 1

    def encode(self, difference: Tensors, rng: numpy.random.Generator) -> Tensors:
        """See :class:`Compressor`."""
        found: Tensors = {}
        for name, tensor in difference.items():
            scale = tensor.abs().max().reshape(1) / self.levels
            exact = (tensor.flatten() / scale.clamp(min=torch.finfo(scale.dtype).tiny)).double().numpy()
            codes = numpy.floor(exact + rng.random(exact.shape)).clip(-self.levels, self.levels) + self.levels
            found[f"codes.{name}"] = torch.from_numpy(self._packed(codes.astype(numpy.uint8)))
            found[f"scale.{name}"] = scale
        return found

    def decode(self, sent: Tensors, like: Tensors) -> Tensors:
        """See :class:`Compressor`."""
        found = {}
        for name, tensor in like.items():
            codes, scale = _taken(sent, f"codes.{name}"), _taken(sent, f"scale.{name}")
            if (
                codes.dtype != torch.uint8
                or codes.shape != (-(-tensor.numel() * self.bits // 8),)
                or scale.shape != (1,)
            ):
                raise UploadRejected(
                    f"The codes of '{name}' are not {self.bits} bits for each of {tensor.numel()} entries."
                )
            whole = torch.from_numpy(self._unpacked(codes.numpy())[: tensor.numel()].astype(numpy.int16))
            found[name] = ((whole - self.levels).to(scale.dtype) * scale).view(tensor.shape)
        return found

    def _packed(self, codes: numpy.ndarray) -> numpy.ndarray:
        if self.bits == 8:
            return codes
        even = numpy.pad(codes, (0, len(codes) % 2))
        return (even[::2] << 4) | even[1::2]

    def _unpacked(self, packed: numpy.ndarray) -> numpy.ndarray:
        return packed if self.bits == 8 else numpy.stack([packed >> 4, packed & 15], 1).reshape(-1)


def compressor(name: str, fraction: float = 0.1, bits: int = 8) -> Compressor:
    """`identity`, `top-k` (with `fraction`), `sign` or `quantise` (with `bits`)."""
    found: Mapping[str, Compressor] = {
        "identity": Identity(), "top-k": TopK(fraction), "sign": Sign(), "quantise": Quantise(bits)
    }  # fmt: skip
    if name not in found:
        raise ConfigError.unknown("compressor", name, found)
    return found[name]


def _taken(sent: Tensors, name: str) -> torch.Tensor:
    if name not in sent:
        raise UploadRejected(f"A message has no '{name}'.")
    return sent[name]
