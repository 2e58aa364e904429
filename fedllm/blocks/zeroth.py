"""Zeroth order - directions that everybody regenerates from a seed, and what methods do with them.

A zeroth-order method moves weights along random directions z ~ N(0, I) and sends numbers instead of tensors, so every
machine has to make the same z to the last bit. Entry e of the tensor `name` under a seed is a function of (seed, name,
e) alone: a counter is mixed by integer arithmetic (the finaliser of SplitMix64; Steele, Lea and Flood, OOPSLA 2014),
each 64-bit word gives two entries, and an entry is the sum of two looked-up quantiles of the normal distribution. There
is no logarithm or cosine in it, whose last bit differs between machines: only integers, a table that is checked, and
one float32 addition. Device, chunking and order of the tensors cannot change it.

The table has 65,536 equally likely values, so z has mean 0, variance 1 up to rounding, and lies within 6.1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import cast

import numpy as np
import torch

from fedllm.core.errors import ConfigError, ModelError, UploadRejected
from fedllm.core.message import Dense, Json, Part
from fedllm.core.reducer import Reducer, Running, Weighting
from fedllm.core.seeds import derive
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train

CHUNK = 1 << 15
"""Entries made at once: what fits a core's cache."""
SCORES = ("magnitude", "count")
"""What FedKSeed-Pro remembers of every seed beside its sum."""
SEED_LIMIT = 2**31
"""Seeds that travel are below this, so that one takes four bytes."""
CLIP = 1000.0
"""Slopes are clipped to this before they are averaged into scores."""
QUANTILES = 1 << 16
TABLE_HASH = "dfdb399543b1ac6e4d1d912ee78c6c4a887fba09462a409b98081dfbc7543be3"
"""SHA-256 of the table: a machine that computes another one says so instead of walking in other directions."""


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


GOLDEN, FIRST, SECOND = (_signed(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def noise(seeds: Sequence[int], name: str, start: int, stop: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Entries start..stop-1 of the flattened tensor `name` under each seed: float32, [len(seeds), stop - start].

    Args:
        seeds: numbers from 0 to 2^63 - 1.
        name: the tensor's name.
        start: first entry.
        stop: one past the last entry.
        device: where it is made; the numbers are the same everywhere.
    """
    first, last = start // 2, (stop + 1) // 2
    a = _mixed(_mixed(torch.tensor(seeds, dtype=torch.int64).mul_(GOLDEN)).add_(_name_key(name)))
    b = _mixed(a + GOLDEN)
    a, b = a.to(device).unsqueeze(1), b.to(device).unsqueeze(1)
    words = torch.arange(first, last, device=device).mul_(GOLDEN) + a
    words = _folded(_folded(words, 30).mul_(FIRST).add_(b), 27).mul_(SECOND)
    pieces = _folded(words, 31).view(torch.int16).to(torch.int32).bitwise_and_(QUANTILES - 1)
    values = _table(str(device)).index_select(0, pieces.flatten()).view(len(seeds), -1, 2)
    return (values[..., 0] + values[..., 1])[:, start - 2 * first : stop - 2 * first]


def direction(seed: int, name: str, like: torch.Tensor) -> torch.Tensor:
    """z of one tensor in the shape, on the device and in the dtype (float32 or better) of `like`."""
    found = torch.empty(like.numel(), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    for start, stop in pieces(like.numel()):
        found[start:stop] = noise([seed], name, start, stop, like.device)[0]
    return found.view(like.shape)


def pieces(count: int, rows: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges that cover `count` entries, of a size at which `rows` of them fit a core's cache."""
    size = max(2, CHUNK // max(rows, 1))
    return ((start, min(start + size, count)) for start in range(0, count, size))


def combined(
    seeds: Sequence[int], values: torch.Tensor, name: str, start: int, stop: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """sum_j values_j z(seeds_j) of some entries, float64, added in the order given; zero values cost nothing.

    Where the values are float32 numbers every product is exact, so that the sum has the same bits on every device.
    """
    used = torch.nonzero(values).flatten().tolist()
    total = torch.zeros(stop - start, dtype=torch.float64, device=device)
    rows = max(1, CHUNK // max(stop - start, 1))
    for begin in range(0, len(used), rows):
        chosen = used[begin : begin + rows]
        found = noise([seeds[j] for j in chosen], name, start, stop, device).double()
        for row in found.mul_(values[chosen].to(device, torch.float64).unsqueeze(1)):
            total.add_(row)
    return total


def replay(
    start: Mapping[str, torch.Tensor], seeds: Sequence[int], values: torch.Tensor, scale: float = 1.0
) -> Tensors:
    """start + scale * sum_j values_j z(seeds_j): new tensors; entries that are not floating-point are copied."""
    found = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in start.items()}
    replay_(found, seeds, values, scale)
    return found


def rebuilt(start: Mapping[str, torch.Tensor], seeds: Sequence[int], values: torch.Tensor, scale: float) -> Tensors:
    """:func:`replay` over float32 masters, given back in the dtypes of `start`."""
    moved = replay({name: tensor.float() for name, tensor in start.items()}, seeds, values, scale)
    return {name: tensor.to(start[name].dtype) for name, tensor in moved.items()}


def replay_(tree: Mapping[str, torch.Tensor], seeds: Sequence[int], values: torch.Tensor, scale: float = 1.0) -> None:
    """As :func:`replay`, in place and piece by piece: no second copy of a tensor is made."""
    if not bool(torch.count_nonzero(values)):
        return
    for name, tensor in tree.items():
        if tensor.is_floating_point():
            flat = tensor.view(-1)
            for start, stop in pieces(flat.numel()):
                move = combined(seeds, values, name, start, stop, flat.device).mul_(scale)
                flat[start:stop] = move.add_(flat[start:stop])


def shift_(tree: Mapping[str, torch.Tensor], seed: int, by: float) -> None:
    """tree += by * z(seed), in place and piece by piece, in the dtype of each tensor."""
    for name, tensor in tree.items():
        if tensor.is_floating_point():
            flat = tensor.view(-1)
            for start, stop in pieces(flat.numel()):
                flat[start:stop] += noise([seed], name, start, stop, flat.device)[0].to(flat.dtype).mul_(by)


def cosines(tree: Mapping[str, torch.Tensor], seeds: Sequence[int]) -> torch.Tensor:
    """The cosine of z(seed) with all of `tree` for each seed: float64, [len(seeds)]; 0 for a tree of zeros."""
    dots, squares = (torch.zeros(len(seeds), dtype=torch.float64) for _ in range(2))
    whole = 0.0
    for name, tensor in tree.items():
        flat = tensor.reshape(-1).double().cpu()
        whole += float(flat.square().sum())
        for start, stop in pieces(flat.numel(), len(seeds)):
            found = noise(seeds, name, start, stop).double()
            dots += found @ flat[start:stop]
            squares += found.square().sum(1)
    return dots / (squares.sqrt() * whole**0.5) if whole else dots


def disagreement(left: tuple[Tensors, float], right: tuple[Tensors, float]) -> tuple[float, float]:
    """How far apart the means of two sums are, and how large their common mean is: both mean squares over entries.

    The first is the sample variance (two samples, ddof = 1) of the two means, averaged over entries; infinite where one
    of them is of nothing.

    Args:
        left: a sum and of how many it is.
        right: the other.
    """
    (a, n), (b, m) = left, right
    size = sum(t.numel() for t in a.values())
    if not n or not m:
        return math.inf, 0.0
    variance = sum(float((a[k] / n - b[k] / m).square().sum()) / 2 for k in a) / size
    return variance, sum(float(((a[k] + b[k]) / (n + m)).square().sum()) for k in a) / size


def pool(master: int, size: int) -> list[int]:
    """The `size` candidate seeds that follow from a master seed; all different for any size in use."""
    return [derive(master, "pool", number) for number in range(size)]


@cache
def _name_key(name: str) -> int:
    return derive(0, "noise", name)


@cache
def _table(device: str) -> torch.Tensor:
    """Quantiles of N(0, 1/2) at the middles of 65,536 equal shares, float32, their mean square scaled to 1/2."""
    normal = NormalDist()
    lower = [normal.inv_cdf((number + 0.5) / QUANTILES) for number in range(QUANTILES // 2)]
    scale = (QUANTILES / 4 / math.fsum(value * value for value in lower)) ** 0.5
    table = torch.tensor([scale * v for v in lower] + [-scale * v for v in reversed(lower)], dtype=torch.float32)
    if hashlib.sha256(table.numpy().tobytes()).hexdigest() != TABLE_HASH:
        raise ModelError(
            "This machine computes another table of normal quantiles than others do.",
            "Zeroth-order methods need the same directions at every client.",
            action="Use Python 3.11 or later on little-endian hardware with IEEE floating point.",
        )
    return table.to(device)


def _folded(words: torch.Tensor, by: int) -> torch.Tensor:
    """x ^ (x >>> by), in place."""
    return words.bitwise_xor_((words >> by).bitwise_and_((1 << (64 - by)) - 1))


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64: a bijection of 64-bit words, in place."""
    return _folded(_folded(_folded(words, 30).mul_(FIRST), 27).mul_(SECOND), 31)


# ---------------------------------------------------------------------------------------------------------------------
# what travels


@dataclass(frozen=True)
class Weighed(Part):
    """One client's tensors with the weight of its upload: what a :class:`Kept` reducer keeps."""

    kind = "weighed"
    tensors: Tensors
    weight: float

    def to_wire(self) -> tuple[Tensors, Json]:
        """See :class:`Part`."""
        return self.tensors, self.weight

    @classmethod
    def from_wire(cls, tensors: Tensors, facts: Json) -> Weighed:
        """See :class:`Part`."""
        return cls(tensors, float(facts))


def pairs(seeds: Sequence[int], values: torch.Tensor) -> Tensors:
    """(seed or index, value) pairs as they travel, 8 bytes each: int32 `seed` and float32 `value`, [n]."""
    return {"seed": torch.tensor(seeds, dtype=torch.int32), "value": values.float()}


@dataclass(frozen=True)
class Kept(Reducer):
    """Every part with its weight, by client: for methods whose server replays directions, or looks at single uploads.

    Not linear: pairs have a sum only once they are spread over a pool.

    Args:
        most: the most :func:`pairs` of an upload; None where parts are dense tensors.
        below: seeds (or indices) must be smaller than this.
    """

    linear = False
    most: int | None = None
    below: int = SEED_LIMIT

    def begin(self) -> Running:
        """See :class:`Reducer`. The result is a dict from client id to :class:`Weighed`, in the order of the ids."""
        return _Keeping(self)


class _Keeping(Running):
    def __init__(self, rule: Kept) -> None:
        self.rule, self.parts = rule, {}

    def check(self, part: Part, client: str) -> None:
        """See :class:`Running`."""
        if not isinstance(part, Dense):
            raise UploadRejected(f"Client '{client}' sent a {part.kind} part.", "Expected: dense.")
        if self.rule.most is not None:
            _check_pairs(part.tensors, self.rule.most, self.rule.below, client)

    def add(self, part: Part, weight: float, client: str) -> None:
        """See :class:`Running`."""
        if isinstance(part, Dense):
            self.parts[client] = Weighed(part.tensors, weight)

    def result(self) -> dict[str, Weighed]:
        return dict(sorted(self.parts.items()))


def _check_pairs(tensors: Tensors, most: int, below: int, client: str) -> None:
    """Raise :class:`UploadRejected` unless `tensors` are at most so many pairs with seeds in range."""
    seed, value = tensors.get("seed"), tensors.get("value")
    if seed is None or value is None or len(tensors) != 2:
        raise UploadRejected(f"Client '{client}' sent {sorted(tensors)}.", "Expected: seed and value.")
    if seed.dtype != torch.int32 or value.dtype != torch.float32 or seed.dim() != 1 or seed.shape != value.shape:
        shapes = f"{seed.dtype} {tuple(seed.shape)} and {value.dtype} {tuple(value.shape)}"
        raise UploadRejected(
            f"Client '{client}' sent seeds and values as {shapes}.", "Expected: int32 and float32 [n]."
        )
    if len(seed) > most:
        raise UploadRejected(f"Client '{client}' sent {len(seed)} pairs.", f"At most {most} are asked for.")
    if len(seed) and (int(seed.min()) < 0 or int(seed.max()) >= below):
        raise UploadRejected(f"Client '{client}' sent a seed outside the pool.", f"Allowed: 0 to {below - 1}.")


def shares(kept: Mapping[str, Weighed], weighting: Weighting) -> dict[str, float]:
    """How much each client counts in a mean; all 0 where every weight is 0."""
    weights = {client: part.weight if weighting == "examples" else 1.0 for client, part in kept.items()}
    total = sum(weights.values())
    return {client: weight / total if total else 0.0 for client, weight in weights.items()}


def by_seed(sent: Tensors, size: int) -> Tensors:
    """:func:`pairs` over a pool: `sums` of slopes, `magnitude` of clipped ones, `count`; each [size] in float64."""
    places, values = sent["seed"].long(), sent["value"].double()
    each = {"sums": values, "magnitude": values.clamp(-CLIP, CLIP).abs(), "count": torch.ones_like(values)}
    return {name: torch.zeros(size, dtype=torch.float64).index_add_(0, places, v) for name, v in each.items()}


def pooled(collected: Mapping[str, Part], size: int, weighting: Weighting) -> Tensors:
    """:func:`by_seed` of all clients: the mean of their sums, and magnitudes and counts added up."""
    kept = cast("Mapping[str, Weighed]", collected)
    part, total = shares(kept, weighting), by_seed(pairs([], torch.zeros(0)), size)
    for client, weighed in kept.items():
        for name, found in by_seed(weighed.tensors, size).items():
            total[name] += found * part[client] if name == "sums" else found
    return total


def chances(pool: Tensors) -> torch.Tensor:
    """How likely FedKSeed-Pro draws each seed: softmax of the mean magnitudes scaled to [0, 1]; [K], float64.

    The mean of a seed has a first entry of 0 beside what was seen of it.
    """
    score = pool["magnitude"] / (1 + pool["count"])
    width = score.max() - score.min()
    return torch.softmax((score - score.min()) / width if width > 0 else torch.zeros_like(score), 0)


def drawn(rng: np.random.Generator, size: int, steps: int, chances: torch.Tensor | None = None) -> np.ndarray:
    """The places in a pool of `size` seeds that a client walks, with repetition; uniform without `chances` [size]."""
    p = None if chances is None else (chances.double() / chances.double().sum()).numpy()
    return rng.choice(size, size=steps, p=p)


def plain_steps(train: Train, why: str) -> None:
    """Raise :class:`ConfigError` unless `train` is plain SGD of a constant rate; `why` ends the sentence."""
    needed: dict[str, tuple[object, object]] = {
        "optimizer": (train.optimizer, "sgd"),
        "momentum": (train.momentum, 0.0),
        "weight_decay": (train.weight_decay, 0.0),
        "clip_norm": (train.clip_norm, None),
        "epochs": (train.epochs, None),
        "schedule.kind": (train.schedule.kind, "constant"),
        "schedule.warmup": (train.schedule.warmup, 0.0),
    }
    for name, (given, allowed) in needed.items():
        if given != allowed:
            text = "null" if allowed is None else allowed
            raise ConfigError(f"train.{name}={given} cannot be used: {why}.", action=f"Set train.{name}={text}.")
