"""Mixing - how peers without a server come to agree: gossip, push-sum, compressed gossip, rings of exact means.

Everything here is arithmetic of one peer on what it holds and what it was sent; who sends what to whom is the
protocol's. Mixing adds weighted differences, x + sum_j w_j (x_j - x), so that two peers move by exactly opposite
amounts and peers that agree stay where they are.

Sources: D-PSGD, Lian et al., NeurIPS 2017, arXiv:1705.09056; SGP, Assran et al., ICML 2019, arXiv:1811.10792; CHOCO,
Koloskova et al., ICML 2019, arXiv:1902.00340 (section 3 and 4); Moshpit, Ryabinin et al., NeurIPS 2021, arXiv:2103.03239.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy
import torch

from fedllm.core.errors import ConfigError, UploadRejected
from fedllm.core.tensors import Tensors, add, finite, norm, same_shapes, subtract, zeros

Weighted = Iterable[tuple[float, Tensors]]
"""(weight, what a neighbour sent), in the order of their ids."""


def checked(sent: Tensors, like: Tensors, sender: str) -> Tensors:
    """`sent` where it is finite and has the names and shapes of `like`; raises :class:`UploadRejected` otherwise.

    One value that is not finite would reach every peer in as many rounds as the graph is wide.
    """
    same_shapes(sent, like, f"What '{sender}' sent")
    bad = finite(sent)
    if bad is not None:
        raise UploadRejected(f"'{sender}' sent a value that is not finite in '{bad}'.")
    return sent


def mix(own: Tensors, inbox: Weighted) -> Tensors:
    """x + sum_j w_j (x_j - x): what D-PSGD's row of weights gives, its diagonal being 1 - sum_j w_j."""
    return choco(own, own, inbox, 1.0)


def choco(own: Tensors, copy: Tensors, inbox: Weighted, gamma: float) -> Tensors:
    """x + gamma sum_j w_j (xhat_j - xhat): own model, own public copy, the neighbours' copies, the consensus step."""
    total = zeros(own)
    for weight, sent in inbox:
        total = add(total, subtract(sent, copy), weight)
    return add(own, total, gamma)


def push_sum(
    own: tuple[Tensors, float], share: float, inbox: Iterable[tuple[float, Tensors, float]]
) -> tuple[Tensors, float]:
    """The new (x, w): the share this peer keeps of its own and the shares of what others sent.

    Args:
        own: x and w.
        share: A_ii.
        inbox: (A_ij, x_j, w_j) of each sender.
    """
    x, w = add(zeros(own[0]), own[0], share), own[1] * share
    for weight, sent, mass in inbox:
        x, w = add(x, sent, weight), w + weight * mass
    return {name: tensor.to(own[0][name].dtype) for name, tensor in x.items()}, w


def ratio(x: Tensors, w: float) -> Tensors:
    """Push-sum's model z = x / w."""
    return x if w == 1.0 else {name: tensor / w for name, tensor in x.items()}


class Agreement:
    """The mean of models and how far they lie from it, one after the other (Welford), in float64."""

    def __init__(self) -> None:
        self.n, self._mean, self._squares = 0, {}, 0.0

    def add(self, model: Tensors) -> None:
        """One more model."""
        model = {name: tensor.double() for name, tensor in model.items()}
        self.n += 1
        before = self._mean or zeros(model)
        gap = subtract(model, before)
        self._mean = add(before, gap, 1 / self.n)
        after = subtract(model, self._mean)
        self._squares += sum(float((gap[name] * after[name]).sum()) for name in gap)

    def mean(self, like: Tensors) -> Tensors:
        """The averaged model, in the dtypes of `like`."""
        return {name: tensor.to(like[name].dtype) for name, tensor in self._mean.items()}

    @property
    def spread(self) -> float:
        """Root mean square distance to the mean, as a share of the mean's norm; 0 where all agree."""
        distance = math.sqrt(max(self._squares, 0.0) / max(self.n, 1))
        return distance / max(norm(self._mean), 1e-30) if distance else 0.0


# -- compressors ----------------------------------------------------------------------------------------------------------


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
            if places.shape != values.shape or (len(places) and not 0 <= int(places.min()) <= int(places.max()) < tensor.numel()):
                raise UploadRejected(f"The entries of '{name}' lie outside of its {tensor.numel()}.")
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
    """Whole numbers of `bits` bits (4 or 8) in units of each tensor's largest magnitude, rounded at random (unbiased)."""

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
            if codes.dtype != torch.uint8 or codes.shape != (-(-tensor.numel() * self.bits // 8),) or scale.shape != (1,):
                raise UploadRejected(f"The codes of '{name}' are not {self.bits} bits for each of {tensor.numel()} entries.")
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


# -- exact means ----------------------------------------------------------------------------------------------------------


class RingMean:
    """One place of a ring all-reduce: m - 1 hops that add up chunks, m - 1 that pass the means on.

    In every hop each peer sends one of m chunks to the next and takes one from the peer before: over all hops
    2 (m - 1) / m of the model's bytes each way. All places end with the same bits.

    Args:
        model: this peer's.
        place: 0 .. size - 1 in the ring.
        size: m.
    """

    def __init__(self, model: Tensors, place: int, size: int) -> None:
        self.like, self.place, self.size, self.hops = model, place, size, 2 * (size - 1)
        dtype = torch.float32
        for tensor in model.values():
            dtype = torch.promote_types(dtype, tensor.dtype)
        flat = torch.cat([tensor.detach().cpu().to(dtype).flatten() for tensor in model.values()])
        self.chunks = [chunk.clone() for chunk in flat.tensor_split(size)]

    def outgoing(self, hop: int) -> torch.Tensor:
        """What this place sends in a hop (from 0)."""
        return self.chunks[self._sent(hop, self.place)]

    def accept(self, hop: int, chunk: torch.Tensor) -> None:
        """What came from the place before; raises :class:`UploadRejected` where it cannot be a chunk."""
        number = self._sent(hop, (self.place - 1) % self.size)
        checked({"chunk": chunk}, {"chunk": self.chunks[number]}, "the peer before in the ring")
        summing = hop < self.size - 1
        self.chunks[number] = self.chunks[number] + chunk if summing else chunk
        if hop == self.size - 2:  # this chunk has now been everywhere
            self.chunks[number] = self.chunks[number] / self.size

    def result(self) -> Tensors:
        """The mean over the ring."""
        sizes = [tensor.numel() for tensor in self.like.values()]
        pieces = torch.cat(self.chunks).split(sizes)
        return {
            name: piece.view(tensor.shape).to(tensor.dtype)
            for (name, tensor), piece in zip(self.like.items(), pieces, strict=True)
        }

    def _sent(self, hop: int, place: int) -> int:
        """The number of the chunk that a place sends: it begins with its own, and again with the one it completed."""
        return (place - hop) % self.size if hop < self.size - 1 else (place + 1 - (hop - self.size + 1)) % self.size
