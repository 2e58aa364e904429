"""Mixed ranks - clients whose LoRA ranks differ, over one global pair of the largest rank.

A client of rank r has the first r rows of every A and columns of every B, and uploads its factors as they are (not
their change). All have one scale, alpha / largest rank: with alpha / r the same factors would mean different changes.
Training pads with zeros: rows of A and columns of B that are both zero have zero gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from fedllm.blocks.lora import A, B, LoraPair, pairs, rank_view
from fedllm.core.errors import ConfigError, UploadRejected
from fedllm.core.message import Dense, Owned, Part, Received
from fedllm.core.method import Method
from fedllm.core.reducer import OwnedSum, Reducer, Running, Weighting
from fedllm.core.roster import Member
from fedllm.core.seeds import derive
from fedllm.core.server import Server
from fedllm.core.state import State
from fedllm.core.tensors import Tensors

PRODUCT = ".lora_BA"
"""Ending of the name of a product."""


class MixedRanks(Method, abstract=True):
    """A method over LoRA factors whose clients may have different ranks."""

    adapters = ("lora",)
    mixes = ("ranks",)
    feeds = False
    absolute = True

    ranks: tuple[int, ...] = ()
    """Ranks of clients that no group gives one; each client has one of them, by a seeded draw. []: the adapter's."""

    def init(self, start: Tensors) -> State:
        """The learner's first values, which have the largest rank."""
        largest = largest_rank(start)
        wrong = next((rank for rank in self.ranks if not 1 <= rank <= largest), None)
        if wrong is not None:
            raise ConfigError(
                f"method.ranks holds {wrong}.",
                f"Allowed: 1 to adapter.rank={largest}, the largest rank.",
                action=f"Set adapter.rank={wrong}." if wrong > 0 else "Leave it out.",
            )
        return State(start)

    async def prepare(self, server: Server, state: State) -> State:
        """A seed, from which every client's rank follows."""
        return replace(state, numbers={**state.numbers, "rank_seed": derive(server.seed, "ranks")})

    def rank(self, state: State, client: Member) -> int:
        """The client's rank: its group's, else one of `ranks`, else the largest."""
        if client.group.rank is not None:
            return client.group.rank
        if not self.ranks:
            return largest_rank(state.params)
        return self.ranks[derive(state.numbers.get("rank_seed", 0), client.id) % len(self.ranks)]

    def distribute(self, state: State, client: Member) -> Received:
        """The first rows of A and columns of B, as many as the client's rank."""
        return Received(rank_view(state.params, self.rank(state, client)).extract(state.params))


def largest_rank(tensors: Tensors) -> int:
    """The rank of the first pair; raises :class:`ConfigError` where there is none."""
    found = next((tensor.shape[0] for name, tensor in tensors.items() if name.endswith(A)), None)
    if found is None:
        raise ConfigError("No trainable tensor is a LoRA factor.", action="Set adapter.kind=lora.")
    return found


def factors(params: Tensors) -> Owned:
    """The factors of a client as they are uploaded: entries of the global pair that this client owns."""
    rank = largest_rank(params)
    return Owned(params, rank_view(params, rank))


def products(params: Tensors) -> Tensors:
    """B A of every pair under its layer's name, [out, in], and the tensors that are no factors: they can be summed."""
    whole = {name: tensor for name, tensor in params.items() if not name.endswith((A, B))}
    return {**{name + PRODUCT: pair.product() for name, pair in pairs(params).items()}, **whole}


def widened(found: Tensors, like: Tensors) -> dict[str, LoraPair]:
    """The pairs of `found` with zeros behind their entries up to the widths of those of `like`; ranks stay."""
    return {
        name: LoraPair(_grown(pair.a, [None, like[name + A].shape[1]]), _grown(pair.b, [like[name + B].shape[0], None]))
        for name, pair in pairs(found).items()
    }


@dataclass(frozen=True)
class _Sent:
    """What one client sent, and its weight."""

    tensors: Tensors
    weight: float


class _Slices(Running):
    """Takes leading slices of pairs; whole layers may be missing, half a pair may not."""

    def __init__(self, weighting: Weighting) -> None:
        self.weighting = weighting
        self.sent: dict[str, _Sent] = {}

    def check(self, part: Part, client: str) -> None:
        """See :class:`Running`."""
        what = f"The upload of client '{client}'"
        if not isinstance(part, Owned):
            raise UploadRejected(f"{what} is a {part.kind} part.", "Expected: owned.")
        for name, region in part.view.regions.items():
            if any(isinstance(entry, torch.Tensor) or entry.start for entry in region) or part.view.scales:
                raise UploadRejected(f"{what} has '{name}' in a part that is not the first rows and columns.")
            other = name.removesuffix(A) + B if name.endswith(A) else name.removesuffix(B) + A
            if name.endswith((A, B)) and other not in part.tensors:
                raise UploadRejected(f"{what} has '{name}' and not '{other}'.")
        for name, pair in pairs(part.tensors).items():
            if not bool(torch.isfinite(pair.norm())):
                raise UploadRejected(f"{what} has a product of '{name}' that is not finite.")

    def add(self, part: Part, weight: float, client: str) -> None:
        """See :class:`Running`."""
        if isinstance(part, Owned):
            self.sent[client] = _Sent(part.tensors, weight if self.weighting == "examples" else 1.0)

    def names(self) -> list[str]:
        """Every tensor that somebody sent, in the order of the first who did."""
        return list(dict.fromkeys(name for sent in self.sent.values() for name in sent.tensors))

    def ordered(self) -> list[_Sent]:
        """By client id, so that the order of arrival does not show."""
        return [sent for _, sent in sorted(self.sent.items())]


@dataclass(frozen=True)
class ProductMean(Reducer):
    """The mean of the products B A of pairs of any ranks, as one pair whose rank is the sum of theirs.

    Factors are stacked and the weights folded into B, so nothing dense is formed. Who lacks a layer is left out of
    that layer's weights. Tensors that are no LoRA factors become their mean. Not linear in what is uploaded: the sum of
    factors is not the sum of products, so it cannot be formed in secret.
    """

    weighting: Weighting = "examples"

    def begin(self) -> Running:
        """See :class:`Reducer`. The result is a :class:`Dense` part."""
        return _Products(self.weighting)


class _Products(_Slices):
    def result(self) -> Part | None:
        """See :class:`Running`."""
        found: Tensors = {}
        for name in self.names():
            held = [(sent.tensors, sent.weight) for sent in self.ordered() if name in sent.tensors]
            total = sum(weight for _, weight in held)
            if total <= 0 or name.endswith(B):
                continue
            if not name.endswith(A):
                found[name] = _sum([(tensors[name], weight / total) for tensors, weight in held])
                continue
            other = name.removesuffix(A) + B
            found[name] = torch.cat([_grown(t[name], [None, _most(held, name, 1)]) for t, _ in held])
            columns = [_grown(t[other] * (w / total), [_most(held, other, 0), None]) for t, w in held]
            found[other] = torch.cat(columns, 1)
        return Dense(found) if found else None


@dataclass(frozen=True)
class NormMean(Reducer):
    """A sum of zero-padded factors in which each client weighs as the norm of all its products, ||B A|| (Frobenius).

    Where all norms are zero, the plain weights take their place. The weights depend on what was uploaded, so it is not
    linear. To form it in secret takes two phases: the norms are revealed, then the sum of tensors that each client
    scaled by its share is linear.

    Args:
        weighting: the plain weights.
        by_norm: False weighs by the plain weights always: zero-padded FedAvg.
        cap: no norm counts for more than so many times the median; None for no limit.
    """

    weighting: Weighting = "examples"
    by_norm: bool = True
    cap: float | None = None

    def begin(self) -> Running:
        """See :class:`Reducer`. The result is an :class:`OwnedSum` whose sums are already weighted by shares."""
        return _Norms(self)

    def shares(self, norms: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """The weights, which sum to 1 (0 where all plain weights are 0 too); float64, shape [clients]."""
        if self.cap is not None:
            norms = norms.clamp(max=self.cap * norms.median())
        weights = norms if self.by_norm and float(norms.sum()) > 0 else plain
        return weights / weights.sum().clamp(min=torch.finfo(torch.float64).tiny)


class _Norms(_Slices):
    def __init__(self, rule: NormMean) -> None:
        super().__init__(rule.weighting)
        self.rule = rule

    def result(self) -> OwnedSum | None:
        """See :class:`Running`."""
        held = self.ordered()
        norms = torch.tensor([total_norm(sent.tensors) for sent in held], dtype=torch.float64)
        plain = torch.tensor([sent.weight for sent in held], dtype=torch.float64)
        shares = self.rule.shares(norms, plain).tolist()
        sums, weights = {}, {}
        for name in self.names():
            own = [
                (sent.tensors[name], share) for sent, share in zip(held, shares, strict=True) if name in sent.tensors
            ]
            sums[name] = _sum(own).double()
            weights[name] = _sum([(torch.ones_like(tensor), share) for tensor, share in own]).double()
        return OwnedSum(sums, weights) if sums and sum(shares) > 0 else None


def total_norm(tensors: Tensors) -> float:
    """||B A|| over all layers: the root of the sum of squares; no product is formed."""
    return float(sum(float(pair.norm().double()) ** 2 for pair in pairs(tensors).values()) ** 0.5)


def _most(held: list[tuple[Tensors, float]], name: str, dimension: int) -> int:
    return max(tensors[name].shape[dimension] for tensors, _ in held)


def _grown(tensor: torch.Tensor, shape: list[int | None]) -> torch.Tensor:
    """`tensor` with zeros behind its entries up to `shape`; None keeps a dimension."""
    more = [0 if size is None else size - here for size, here in zip(shape, tensor.shape, strict=True)]
    return functional.pad(tensor, [n for size in reversed(more) for n in (0, size)])


def _sum(weighted: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """The weighted sum of tensors padded to the largest shape; summed in float64, given in float32."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor, _ in weighted), strict=True)]
    total = torch.zeros(shape, dtype=torch.float64)
    for tensor, weight in weighted:
        total.add_(_grown(tensor.double(), list(shape)), alpha=weight)
    return total.float()
