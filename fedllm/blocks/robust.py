"""Robust - rules that make one update of many while some of the clients may lie.

Every rule is a pure function of a matrix [K, D], one row per client, its change of the global model, and of the
clients' weights [K]. What a rule knows of earlier rounds is given as `memory` and comes back in the
:class:`Verdict`; what is drawn comes from a generator that is given. Sums are kept in float64.

Krum and its kin and the rules that go coordinate by coordinate give every client one vote: a weight is what a client
says of itself, and a liar would state a large one. Where the weights count, the rule says so. Rules that look for the
odd client, and those made of noise, are in :mod:`fedllm.blocks.anomaly`.

Drop uploads that are not finite before a rule is asked, and count them among the f attackers: here they are refused.

Source: FedSecurity, Han et al., KDD 2024, arXiv:2306.04959 (the catalogue); each rule names its own paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cmp_to_key
from typing import Literal

import torch

from fedllm.core.errors import ConfigError, UploadRejected
from fedllm.core.tensors import Tensors

COLUMNS_AT_ONCE = 1 << 14
"""So many columns are worked on at a time: their float64 copies fit a cache, and memory stays bounded for any D."""
LARGEST = 1e100
"""A value beyond it is refused like an infinite one: its square would be infinite, and odd clients no longer seen."""
NEVER_ZERO = 1e-300
"""In place of a zero that would be divided by; smaller than any distance that counts."""


@dataclass(frozen=True)
class Verdict:
    """What a rule made of the uploads of a round.

    Attributes:
        update: [D], in the dtype of the rows.
        kept: [K]: bool where a rule takes or drops whole clients; else float64 from 0 (nothing of this client counted)
            to 1 (all of it). Of rules that go by coordinate: in which share of them the value lay among those used.
        note: what a user should know, in a sentence; empty where there is nothing.
        memory: what to give to the rule in the next round; None where it needs nothing.
    """

    update: torch.Tensor
    kept: torch.Tensor
    note: str = ""
    memory: Tensors | None = None


# -- what all rules need -----------------------------------------------------------------------------------------------


def checked(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weights as shares that sum to 1: [K], float64.

    Raises:
        ConfigError: the rows are no matrix [K >= 1, D >= 1] in float32 or float64, or there are not K weights.
        UploadRejected: a row or a weight is not finite (a row: within :data:`LARGEST`), a weight is negative, or all
            are zero.
    """
    if rows.dim() != 2 or not rows.numel() or rows.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"The uploads are a tensor of shape {tuple(rows.shape)} in {rows.dtype}.",
            "Allowed: [K, D] with K and D above 0, in float32 or float64.",
            action="Stack one flat row per client; with no client, keep the global model.",
        )
    if weights.shape != rows.shape[:1]:
        raise ConfigError(
            f"There are {len(rows)} clients, and weights of shape {tuple(weights.shape)}.", "One weight per client."
        )
    bad = next((i for i, row in enumerate(rows) if not float(row.abs().max()) <= LARGEST), None)
    if bad is not None:
        raise UploadRejected(
            f"The upload in row {bad} holds a value that is not finite.",
            action="Drop it first, and count its client among the attackers.",
        )
    weights = weights.double()
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()) or not float(weights.sum()) > 0:
        raise UploadRejected(f"The weights are {weights.tolist()}.", "Allowed: finite, not negative, not all zero.")
    weights = weights / weights.max()  # so that their sum cannot overflow
    return weights / weights.sum()


def enough(rule: str, k: int, f: int, times: int, plus: int) -> None:
    """Raise :class:`ConfigError` unless f >= 0 and k >= times * f + plus: what `rule` assumes of k clients."""
    least = times * f + plus
    if f >= 0 and k >= least:
        return
    most = (k - plus) // times
    raise ConfigError(
        f"{rule} was given K={k} clients and f={f} attackers.",
        f"It needs f >= 0 and K >= {times}f+{plus}{f' = {least}' if f >= 0 else ''}.",
        f"f={most}" if most >= 0 else None,
        "Lower f, or take more clients a round.",
    )


def positive(rule: str, **values: float) -> None:
    """Raise :class:`ConfigError` for a value that is not a number above 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{rule} was given {name}={value}.", "Allowed: a number above 0.")


def pieces(rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some columns after the others: where they are, and a view of them."""
    for start in range(0, rows.shape[1], COLUMNS_AT_ONCE):
        place = slice(start, start + COLUMNS_AT_ONCE)
        yield place, rows[:, place]


def mix(rows: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """sum_i shares_i rows_i: [D], float64."""
    total = torch.empty(rows.shape[1], dtype=torch.float64)
    for place, piece in pieces(rows):
        total[place] = shares.double() @ piece.double()
    return total


def distances(rows: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """||rows_i - point||: [K], float64. `point` is [D], or a zero for the norms of the rows."""
    squares = torch.zeros(len(rows), dtype=torch.float64)
    for place, piece in pieces(rows):
        squares += (piece.double() - (point[place] if point.dim() else point)).square_().sum(1)
    return squares.sqrt()


def norms(rows: torch.Tensor) -> torch.Tensor:
    """||rows_i||: [K], float64."""
    return distances(rows, torch.zeros((), dtype=torch.float64))


def shrinking(lengths: torch.Tensor, bound: float) -> torch.Tensor:
    """min(1, bound / length): the factors that bring vectors of these lengths to at most `bound`."""
    return (bound / lengths.clamp_min(NEVER_ZERO)).clamp_max(1.0)


def mean_of(
    rows: torch.Tensor, shares: torch.Tensor, kept: torch.Tensor, note: str = "", memory: Tensors | None = None
) -> Verdict:
    """The mean of the rows weighted by shares * kept; where nothing is left, no change of the model, and a note of it.

    Args:
        rows: [K, D].
        shares: [K], as :func:`checked` gives them.
        kept: [K], bool or float64 in [0, 1].
        note: what the rule has to say.
        memory: for the next round.
    """
    left = shares * kept
    if float(left.sum()) > 0:
        return Verdict(mix(rows, left / left.sum()).to(rows.dtype), kept, note or _dropped(kept), memory)
    nobody = "No client was kept: the model stays as it is."
    return Verdict(rows.new_zeros(rows.shape[1]), kept, f"{nobody} {note}".strip(), memory)


def _dropped(kept: torch.Tensor) -> str:
    out = (kept == 0).nonzero().flatten().tolist()
    return f"Dropped {len(out)} of {len(kept)} clients: rows {', '.join(map(str, out))}." if out else ""


def buckets(k: int, size: int, rng: torch.Generator | None) -> torch.Tensor:
    """Who is in which bucket of `size` clients (the last may be smaller): bool [ceil(k / size), k], drawn from `rng`.

    Raises:
        ConfigError: a size outside 1 to k, or no generator for buckets of more than one.
    """
    if not 1 <= size <= k:
        raise ConfigError(f"Buckets of {size} of {k} clients.", f"Allowed: 1 to {k}.", str(min(max(size, 1), k)))
    if size > 1 and rng is None:
        raise ConfigError(f"Buckets of {size} clients are drawn, and no generator was given.", action="Give 'rng'.")
    order = torch.randperm(k, generator=rng) if size > 1 else torch.arange(k)
    members = torch.zeros(-(-k // size), k, dtype=torch.bool)
    members[torch.arange(k) // size, order] = True
    return members


def _bucket_means(rows: torch.Tensor, members: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """[B, D]: the mean of each bucket, weighted by shares (uniformly in a bucket whose shares are all zero)."""
    if members.shape[0] == len(rows):
        return rows
    inside = members * shares
    inside = torch.where(inside.sum(1, keepdim=True) > 0, inside, members.double())
    return torch.stack([mix(rows, row / row.sum()) for row in inside]).to(rows.dtype)


# -- means -------------------------------------------------------------------------------------------------------------


def mean(rows: torch.Tensor, weights: torch.Tensor) -> Verdict:
    """The mean weighted by `weights`: no defence, for comparison. One attacker can make anything of it."""
    return mean_of(rows, checked(rows, weights), torch.ones(len(rows), dtype=torch.bool))


def norm_clip(rows: torch.Tensor, weights: torch.Tensor, *, bound: float) -> Verdict:
    """The mean of u_i / max(1, ||u_i|| / bound), weighted by `weights`.

    Assumes that honest updates are shorter than `bound` > 0. An attacker moves the result by its share of it.
    Source: Sun et al., Can You Really Backdoor Federated Learning?, arXiv:1911.07963, section 4.
    """
    shares = checked(rows, weights)
    positive("Norm clipping", bound=bound)
    factors = shrinking(norms(rows), bound)
    return Verdict(mix(rows, shares * factors).to(rows.dtype), factors, _clipped(factors))


def _clipped(factors: torch.Tensor) -> str:
    n = int((factors < 1).sum())
    return f"Clipped {n} of {len(factors)} updates." if n else ""


def cclip_radius(momentum: float) -> float:
    """tau = 10 / (1 - momentum), the radius of :func:`cclip` for clients that send momentum (of their optimiser).

    Raises:
        ConfigError: a momentum outside [0, 1).
    """
    if not 0.0 <= momentum < 1.0:
        raise ConfigError(f"The momentum is {momentum}.", "Allowed: 0 to below 1.")
    return 10.0 / (1.0 - momentum)


def cclip(
    rows: torch.Tensor,
    weights: torch.Tensor,
    *,
    tau: float,
    bucket: int = 1,
    f: int = 0,
    steps: int = 1,
    rng: torch.Generator | None = None,
    memory: Tensors | None = None,
) -> Verdict:
    """Centred clipping: v + mean_i (b_i - v) min(1, tau / ||b_i - v||) over means b_i of buckets; one vote each.

    v is the update of the round before (`memory`, as it came back), zero in the first. Assumes that attackers are
    fewer than half of the buckets even if each is in another one, ceil(K / bucket) >= 2f+1. An attacker moves the
    result by at most 2 tau steps / ceil(K / bucket).
    Source: Karimireddy et al., Learning from History, ICML 2021, arXiv:2012.10333, section 4; buckets: ICLR 2022,
    arXiv:2006.09365, algorithm 1.

    Args:
        rows: [K, D].
        weights: [K]; not used.
        tau: the radius, see :func:`cclip_radius`.
        bucket: so many clients are averaged first; more than 1 needs `rng`.
        f: attackers assumed.
        steps: so many times v is moved.
        rng: draws the buckets.
        memory: {"reference": [D]} or None.
    """
    checked(rows, weights)
    positive("Centred clipping", tau=tau, steps=steps)
    members = buckets(len(rows), bucket, rng)
    enough("Centred clipping (K: its buckets)", len(members), f, 2, 1)
    center = _reference(memory, rows)
    means = _bucket_means(rows, members, torch.ones(len(rows), dtype=torch.float64))
    factors = torch.ones(len(means), dtype=torch.float64)
    for _ in range(steps):
        factors = shrinking(distances(means, center), tau)
        center = center * (1 - factors.mean()) + mix(means, factors / len(means))
    update = center.to(rows.dtype)
    return Verdict(update, factors @ members.double(), _clipped(factors), {"reference": update})


def _reference(memory: Tensors | None, rows: torch.Tensor) -> torch.Tensor:
    if not memory:
        return torch.zeros(rows.shape[1], dtype=torch.float64)
    if "reference" not in memory or memory["reference"].shape != rows.shape[1:]:
        raise ConfigError("The memory of centred clipping holds no 'reference' in the shape of an update.")
    return memory["reference"].double()


def slsgd(
    rows: torch.Tensor, weights: torch.Tensor, *, alpha: float, option: Literal[1, 2] = 1, b: int = 0, f: int = 0
) -> Verdict:
    """(1 - alpha) w + alpha (w + u), in updates alpha u: u is the mean (option 1) or the mean without b at each end.

    Option 1 weighs by `weights` and withstands no attacker; option 2 gives one vote each and assumes f <= b < K / 2.
    Source: Xie et al., SLSGD, ECML 2019, arXiv:1903.06996, algorithm 1.

    Args:
        rows: [K, D].
        weights: [K].
        alpha: 0 to 1.
        option: 1 or 2.
        b: values dropped at each end of a coordinate (option 2).
        f: attackers assumed.
    """
    shares = checked(rows, weights)
    if not 0.0 <= alpha <= 1.0 or option not in (1, 2):
        raise ConfigError(f"SLSGD was given alpha={alpha} and option={option}.", "Allowed: 0 to 1, and 1 or 2.")
    if option == 1 and (b or f):
        raise ConfigError(f"SLSGD's option 1 was given b={b} and f={f}.", "It drops nothing.", action="Take option 2.")
    found = mean_of(rows, shares, torch.ones(len(rows), dtype=torch.bool)) if option == 1 else _trimmed(rows, b, f)
    return Verdict((alpha * found.update.double()).to(rows.dtype), found.kept)


def robust_learning_rate(rows: torch.Tensor, weights: torch.Tensor, *, theta: int, f: int = 0) -> Verdict:
    """The mean weighted by `weights`, with its sign turned in every coordinate where |sum_i sign(u_ij)| < theta.

    Assumes f < theta <= K-2f: attackers alone do not reach theta, and the honest do where they agree. It bounds no
    length: clip first.
    Source: Ozdayi et al., Defending against Backdoors with Robust Learning Rate, AAAI 2021, arXiv:2007.03767.
    """
    shares, k = checked(rows, weights), len(rows)
    if f < 0 or not f < theta <= k - 2 * f:
        raise ConfigError(
            f"The robust learning rate was given theta={theta}, K={k} clients and f={f} attackers.",
            "It needs f >= 0 and f < theta <= K-2f.",
            action="Lower f, or take more clients a round.",
        )
    update, turned = mix(rows, shares), 0
    for place, piece in pieces(rows):
        against = piece.sign().sum(0).abs() < theta
        update[place][against] *= -1
        turned += int(against.sum())
    note = f"Turned {turned} of {rows.shape[1]} coordinates." if turned else ""
    return Verdict(update.to(rows.dtype), torch.ones(k, dtype=torch.bool), note)


# -- Krum and its kin --------------------------------------------------------------------------------------------------


def squared_distances(rows: torch.Tensor) -> torch.Tensor:
    """||rows_i - rows_j||^2: [K, K], float64, symmetric to the bit.

    From differences and not from a product of the rows: next to one huge row that would lose all others' digits.
    """
    k = len(rows)
    found = torch.zeros(k, k, dtype=torch.float64)
    for _, piece in pieces(rows):
        wide = piece.double()
        for i in range(k - 1):
            found[i, i + 1 :] += (wide[i + 1 :] - wide[i]).square_().sum(1)
    return found + found.T


def krum_scores(squares: torch.Tensor, f: int) -> torch.Tensor:
    """The sum of the n-f-2 smallest squared distances to others (at least one where there is another): [n]."""
    n = len(squares)
    others = squares.clone().fill_diagonal_(torch.inf).sort(1).values
    return others[:, : min(max(n - f - 2, 1), n - 1)].sum(1)


def krum(rows: torch.Tensor, weights: torch.Tensor, *, f: int) -> Verdict:
    """The one row whose K-f-2 nearest others are nearest to it. Assumes K >= 2f+3. See :func:`multi_krum`."""
    return multi_krum(rows, weights, f=f, m=1)


def multi_krum(rows: torch.Tensor, weights: torch.Tensor, *, f: int, m: int) -> Verdict:
    """The mean of the m rows with the lowest Krum scores, one vote each.

    Assumes K >= 2f+3 and m <= K-f: if an attacker is among the m, an honest row with a higher score is not, which
    bounds how far away it can be. (The catalogue's code asks 2f+2 <= K-m, under which m = K, the mean, could not be.)
    Equal scores go by the rows' contents, so the order of the clients does not show.
    Source: Blanchard et al., Machine Learning with Adversaries, NeurIPS 2017, section 3.

    Args:
        rows: [K, D].
        weights: [K]; not used.
        f: attackers assumed.
        m: rows averaged; 1 is Krum.
    """
    checked(rows, weights)
    enough("Krum", len(rows), f, 2, 3)
    if not 1 <= m <= len(rows) - f:
        raise ConfigError(f"Multi-Krum was given m={m}, K={len(rows)} clients, f={f}.", f"m: 1 to K-f={len(rows) - f}.")
    kept = torch.zeros(len(rows), dtype=torch.bool)
    kept[_ranked(krum_scores(squared_distances(rows), f), rows)[:m]] = True
    return mean_of(rows, torch.ones(len(rows), dtype=torch.float64), kept)


def _ranked(scores: torch.Tensor, rows: torch.Tensor) -> list[int]:
    """The numbers of the rows by score, equal scores by the first entry that differs, equal rows by number."""

    def compare(i: int, j: int) -> int:
        if scores[i] != scores[j]:
            return -1 if scores[i] < scores[j] else 1
        differ = (rows[i] != rows[j]).nonzero()
        if not len(differ):
            return i - j
        return -1 if rows[i, differ[0, 0]] < rows[j, differ[0, 0]] else 1

    return sorted(range(len(scores)), key=cmp_to_key(compare))


def bulyan(rows: torch.Tensor, weights: torch.Tensor, *, f: int) -> Verdict:
    """Krum, K-2f times without its earlier winners; then by coordinate the mean of the K-4f values nearest the median.

    Assumes K >= 4f+3; one vote each. Among n rows left, Krum sums n-f-2 distances and at the end, where that is
    less than one, the single smallest: the second stage holds for any selection, as f attackers stay the minority.
    Of two values as near to the median the smaller is taken.
    Source: El Mhamdi et al., The Hidden Vulnerability of Distributed Learning in Byzantium, ICML 2018, section 4.
    """
    checked(rows, weights)
    enough("Bulyan", len(rows), f, 4, 3)
    squares, left, chosen = squared_distances(rows), list(range(len(rows))), []
    while len(chosen) < len(rows) - 2 * f:
        among = squares[left][:, left]
        chosen.append(left.pop(_ranked(krum_scores(among, f), rows[left])[0] if len(left) > 1 else 0))
    chosen.sort()

    def nearest(ordered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gaps = (ordered - _middle(ordered)).abs()
        used = ordered.gather(0, gaps.sort(dim=0, stable=True).indices[: len(rows) - 4 * f])
        return used.mean(0), used.amin(0), used.amax(0)

    found = _by_coordinate(rows[chosen], nearest)
    kept = torch.zeros(len(rows), dtype=torch.float64)
    kept[chosen] = found.kept
    return Verdict(found.update, kept, _dropped(kept))


# -- by coordinate -----------------------------------------------------------------------------------------------------

Shrink = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Sorted values [K, columns] in float64 -> the result, the smallest and the largest value used, each [columns]."""


def _by_coordinate(rows: torch.Tensor, shrink: Shrink) -> Verdict:
    update, within = rows.new_empty(rows.shape[1]), torch.zeros(len(rows), dtype=torch.float64)
    for place, piece in pieces(rows):
        value, low, high = shrink(piece.sort(0).values.double())
        update[place] = value.to(rows.dtype)
        within += ((piece >= low) & (piece <= high)).sum(1)
    return Verdict(update, within / rows.shape[1])


def _middle(ordered: torch.Tensor) -> torch.Tensor:
    """The median of sorted values along dimension 0; of an even number the mean of the two in the middle."""
    k = len(ordered)
    return ordered[k // 2] if k % 2 else ordered[k // 2 - 1] / 2 + ordered[k // 2] / 2


def coordinate_median(rows: torch.Tensor, weights: torch.Tensor, *, f: int = 0) -> Verdict:
    """The median of every coordinate, one vote each. Assumes K >= 2f+1; the result lies in the honest values' range.

    Source: Yin et al., Byzantine-Robust Distributed Learning, ICML 2018, arXiv:1803.01498, definition 1.
    """
    checked(rows, weights)
    enough("The coordinate median", len(rows), f, 2, 1)
    k = len(rows)
    return _by_coordinate(rows, lambda ordered: (_middle(ordered), ordered[(k - 1) // 2], ordered[k // 2]))


def trimmed_mean(rows: torch.Tensor, weights: torch.Tensor, *, beta: float, f: int = 0) -> Verdict:
    """The mean of every coordinate without its floor(beta K) smallest and as many largest values, one vote each.

    Values are dropped, never whole clients. Assumes 0 <= beta < 1/2 and f <= floor(beta K).
    Source: Yin et al., ICML 2018, arXiv:1803.01498, definition 2.
    """
    checked(rows, weights)
    if not 0.0 <= beta < 0.5:
        raise ConfigError(f"The trimmed mean was given beta={beta}.", "Allowed: 0 to below 0.5.")
    return _trimmed(rows, math.floor(beta * len(rows) + 1e-9), f)  # 0.29 * 100 is 28.999...


def _trimmed(rows: torch.Tensor, count: int, f: int) -> Verdict:
    if not 0 <= f <= count or 2 * count >= len(rows):
        raise ConfigError(
            f"A trimmed mean drops {count} values at each end, of K={len(rows)} clients with f={f} attackers.",
            "It needs 0 <= f <= dropped < K/2.",
            action="Raise beta or b to reach f, or take more clients a round.",
        )

    def trim(ordered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        used = ordered[count : len(rows) - count]
        return used.mean(0), used[0], used[-1]

    return _by_coordinate(rows, trim)


# -- geometric median --------------------------------------------------------------------------------------------------


def geometric_median(
    rows: torch.Tensor,
    weights: torch.Tensor,
    *,
    f: int = 0,
    smoothing: float = 1e-6,
    steps: int = 100,
    tolerance: float = 1e-6,
    bucket: int = 1,
    rng: torch.Generator | None = None,
) -> Verdict:
    """RFA: the z with the smallest sum_i a_i ||u_i - z||, by Weiszfeld steps, with a_i the shares of `weights`.

    z <- sum_i c_i u_i / sum_i c_i with c_i = a_i / max(smoothing, ||u_i - z||), from the coordinate median on: from
    the mean, one huge row would cost many steps. Stops where the gradient is below `tolerance` (its largest is 1).
    With a bucket it is the geometric median of the means of buckets. Assumes that any f clients, or buckets, have less
    than half of the weight; with share a < 1/2 they move z from the honest mean by at most 2 (1-a) / (1-2a) times the
    largest honest distance to it.
    Sources: Pillutla et al., RFA, arXiv:1912.13445, algorithm 2; buckets: Chen et al., arXiv:1705.05491.

    Args:
        rows: [K, D].
        weights: [K].
        f: attackers assumed.
        smoothing: the smallest distance divided by.
        steps: at most so many; the note says where they did not suffice.
        tolerance: see above.
        bucket: so many clients are averaged first; more than 1 needs `rng`.
        rng: draws the buckets.
    """
    shares = checked(rows, weights)
    positive("The geometric median", smoothing=smoothing, steps=steps, tolerance=tolerance)
    members = buckets(len(rows), bucket, rng)
    points, masses = _bucket_means(rows, members, shares), members.double() @ shares
    enough("The geometric median (K: its buckets)", len(masses), f, 2, 1)
    heaviest = float(masses.sort(descending=True).values[:f].sum())
    if heaviest >= 0.5:
        raise ConfigError(
            f"The {f} heaviest of {len(masses)} clients have {heaviest:.0%} of the weight.",
            "The geometric median needs attackers to have less than half.",
            action="Use uniform weights, or cap them.",
        )
    z = coordinate_median(points, torch.ones(len(points))).update.double()
    near, slope = torch.ones_like(masses), 0.0
    for _ in range(steps):
        near = 1 / distances(points, z).clamp_min(smoothing)
        pull = masses * near
        after = mix(points, pull / pull.sum())
        slope = float((after - z).norm() * pull.sum())
        z = after
        if slope <= tolerance:
            break
    note = f"Stopped after {steps} steps with a gradient of {slope:.1e}." if slope > tolerance else ""
    return Verdict(z.to(rows.dtype), (near / near.max()) @ members.double(), note)
