"""Mixing - how peers without a server come to agree: gossip, push-sum, compressed gossip, rings of exact means.

Everything here is arithmetic of one peer on what it holds and what it was sent; who sends what to whom is the
protocol's. Mixing adds weighted differences, x + sum_j w_j (x_j - x), so that two peers move by exactly opposite
amounts and peers that agree stay where they are.

Sources: D-PSGD, Lian et al., NeurIPS 2017, arXiv:1705.09056; SGP, Assran et al., ICML 2019, arXiv:1811.10792; CHOCO,
Koloskova et al., ICML 2019, arXiv:1902.00340 (sections 3, 4); Moshpit, Ryabinin et al., NeurIPS 2021,
arXiv:2103.03239.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy
import torch

from fedllm.blocks.compress import Compressor
from fedllm.core.errors import UploadRejected
from fedllm.core.message import Json
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


# -- public copies -----------------------------------------------------------------------------------------------------


class PublicCopies:
    """CHOCO's xhat of this peer and of its neighbours, as this peer holds them.

    A copy is known by the round of its last change. Peers tell each other what they hold; whoever holds another copy
    than its owner (it was down, or the owner's round was undone) is sent the whole of it in place of the difference.

    Args:
        peer: whose they are.
        first: the copy of everybody before round 1: the common first values.
        held: earlier :attr:`tensors`; None at the beginning.
        tags: peer -> round of the last change of its copy held here; 0 where it is `first`.
        packing: what differences are sent as.
    """

    def __init__(
        self, peer: str, first: Tensors, held: Tensors | None, tags: Mapping[str, int] | None, packing: Compressor
    ) -> None:
        self.peer, self.first, self.packing = peer, first, packing
        self.tensors, self.tags = dict(held or {}), dict(tags or {})

    def of(self, peer: str) -> Tensors:
        """The copy of a peer."""
        return {name: self.tensors.get(f"{peer}\x1f{name}", tensor) for name, tensor in self.first.items()}

    def behind(self, said: Mapping[str, Json]) -> list[str]:
        """Which neighbours hold another copy of this peer than it does itself; `said`: neighbour -> its tags."""
        tag = self.tags.get(self.peer, 0)
        return [peer for peer, tags in said.items() if tags.get(self.peer, 0) != tag]

    def say(self, model: Tensors, round: int, rng: numpy.random.Generator) -> Tensors:
        """What to send so that the own copy comes closer to the model; the own copy changes by it at once."""
        own = self.of(self.peer)
        message = self.packing.encode(subtract(model, own), rng)
        self._set(self.peer, add(own, self.packing.decode(message, own)), round)
        return message

    def hear(self, sender: str, sent: Tensors, whole: bool, round: int) -> Tensors:
        """The renewed copy of a neighbour; raises :class:`UploadRejected` and keeps the old one where `sent` is bad."""
        before = self.of(sender)
        found = sent if whole else checked(self.packing.decode(sent, before), before, sender)
        copy = checked(found if whole else add(before, found), before, sender)
        self._set(sender, copy, round)
        return copy

    def _set(self, peer: str, copy: Tensors, round: int) -> None:
        self.tensors.update({f"{peer}\x1f{name}": tensor for name, tensor in copy.items()})
        self.tags[peer] = round


# -- exact means -------------------------------------------------------------------------------------------------------


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
