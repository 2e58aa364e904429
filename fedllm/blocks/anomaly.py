"""Anomaly - robust rules that look for the odd client, and defences made of noise.

The rules are pure functions as in :mod:`fedllm.blocks.robust`. Where a rule compares clients with their own past, its
memory is by client id: another cohort may come in every round, and row i is not always the same client. Such a
memory holds one vector per client ever seen; `columns` limits what is compared (some methods take the last layer; of
LoRA compare everything).

Two defences work inside a client's training, :func:`soteria` and :func:`wbc`: they change one tensor there.

Source: FedSecurity, Han et al., KDD 2024, arXiv:2306.04959 (the catalogue); each rule names its own paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import numpy
import torch

from fedllm.blocks.robust import (
    Verdict,
    checked,
    distances,
    enough,
    geometric_median,
    mean_of,
    mix,
    multi_krum,
    norm_clip,
    pieces,
    positive,
    shrinking,
)
from fedllm.core.errors import ConfigError
from fedllm.core.tensors import Tensors

ROUNDING = 1e-9
"""What differs by less than this share is the same: equal numbers reached on two ways differ by rounding."""

Score = Literal["krum", "median", "foolsgold"]
"""How odd a client is: its distance to a Krum mean or to the geometric median, or how alike another client it is."""


def _known(
    rows: torch.Tensor, clients: Sequence[str], memory: Tensors | None, columns: slice | None
) -> tuple[torch.Tensor, Tensors]:
    """The columns that are compared [K, F], and what is remembered of the clients of this round.

    Raises:
        ConfigError: an id twice, not one id per row, no columns left, or a memory of another shape.
    """
    if len(clients) != len(rows) or len(set(clients)) != len(rows):
        raise ConfigError(f"{len(rows)} rows have the client ids {list(clients)}.", "One id per row, each once.")
    features = _columns(rows, columns)
    held = {client: (memory or {})[client] for client in clients if client in (memory or {})}
    wrong = next((client for client, past in held.items() if past.shape != features.shape[1:]), None)
    if wrong is not None:
        raise ConfigError(
            f"The memory of client '{wrong}' has shape {tuple(held[wrong].shape)}.", f"Expected ({features.shape[1]},)."
        )
    return features, held


def _columns(rows: torch.Tensor, columns: slice | None) -> torch.Tensor:
    features = rows if columns is None else rows[:, columns]
    if not features.shape[1]:
        raise ConfigError(f"The columns {columns} are none of {rows.shape[1]}.", "At least one must be compared.")
    return features


# -- sybils ------------------------------------------------------------------------------------------------------------


def foolsgold(
    rows: torch.Tensor,
    weights: torch.Tensor,
    *,
    clients: Sequence[str],
    memory: Tensors | None = None,
    columns: slice | None = None,
) -> Verdict:
    """Clients whose summed updates point the same way count less: a mean weighted by a_i times `weights`.

    a_i = 1 - max_j cs_ij, with cs the cosines after pardoning, divided by the largest a, then logit + 1/2, cut to
    [0, 1]. Assumes that honest clients differ more from each other than sybils do, and at least two sybils: a lone
    attacker is not seen, and honest clients with equal data are. It bounds no length: clip first. Where all are
    alike nobody is kept; a rule that divides by the largest a before it looks would keep all of them.
    Source: Fung et al., The Limitations of Federated Learning in Sybil Settings, RAID 2020, algorithm 1.

    Args:
        rows: [K, D].
        weights: [K].
        clients: the id of each row.
        memory: client id -> the sum of its earlier updates [F], float64.
        columns: what is compared; None for all.
    """
    shares = checked(rows, weights)
    history, after = _summed(rows, clients, memory, columns)
    trust = _trust(history)
    trust = (trust / trust.max().clamp_min(ROUNDING)).logit().add(0.5).clamp(0.0, 1.0)
    return mean_of(rows, shares, trust, memory=after)


def _summed(
    rows: torch.Tensor, clients: Sequence[str], memory: Tensors | None, columns: slice | None
) -> tuple[torch.Tensor, Tensors]:
    features, held = _known(rows, clients, memory, columns)
    history = features.double().clone()
    for i, client in enumerate(clients):
        if client in held:
            history[i] += held[client]
    return history, {**(memory or {}), **{client: history[i].clone() for i, client in enumerate(clients)}}


def _trust(history: torch.Tensor) -> torch.Tensor:
    """1 - the largest pardoned cosine with another client: [K], in [0, 1].

    A client least like others than j is pardoned its likeness to j. Largest cosines below 0 count as 0: the product
    of two negative ones would make a client look like a sybil because nobody is like it.
    """
    lengths = history.norm(dim=1, keepdim=True)
    unit = torch.where(lengths > 0, history / lengths, 0.0)
    cosines = (unit @ unit.T).fill_diagonal_(0.0)
    top = cosines.amax(1)
    pardon = torch.where(top[:, None] < top[None, :], top[:, None] / top[None, :], 1.0)
    return (1 - (cosines * pardon).amax(1)).clamp(0.0, 1.0)


# -- three sigma -------------------------------------------------------------------------------------------------------


def three_sigma(
    rows: torch.Tensor,
    weights: torch.Tensor,
    *,
    score: Score = "krum",
    width: float = 1.0,
    f: int = 0,
    clients: Sequence[str] = (),
    memory: Tensors | None = None,
    columns: slice | None = None,
    among: torch.Tensor | None = None,
) -> Verdict:
    """Drops clients whose score lies above mu + width sigma, of this round's scores; the mean of the others.

    Scores are distances to the mean of the ceil(K/2)-1 rows that Krum likes best (K >= 2f+3), to the geometric
    median (K >= 2f+1), both with one vote each, or 1 - the trust of :func:`foolsgold` (before the logit). The mean at
    the end is weighted by `weights`. Of f attackers with equal scores each lies sqrt((K-f)/f) sigma above mu at
    most, so the rule assumes width below that: K > f (1 + width^2). That is needed and does not suffice: one attacker
    far beyond the others widens sigma and hides them, and so do honest clients whose scores spread.
    Source: the catalogue; the scores as in :func:`multi_krum`, :func:`geometric_median`, :func:`foolsgold`.

    Args:
        rows: [K, D].
        weights: [K].
        score: "krum", "median" or "foolsgold".
        width: how many sigma are allowed; 0.5, 1 and 2 are usual.
        f: attackers assumed.
        clients: the id of each row (foolsgold).
        memory: as :func:`foolsgold` has it (foolsgold).
        columns: what is compared; None for all.
        among: bool [K], who may be dropped; None for all.
    """
    shares = checked(rows, weights)
    _three_sigma_assumes(len(rows), f, width, score)
    after: Tensors | None = None
    if score == "foolsgold":
        history, after = _summed(rows, clients, memory, columns)
        scores = 1 - _trust(history)
    else:
        features = _columns(rows, columns)
        scores = distances(features, _center(features, score, f).double())
    limit = scores.mean() + width * scores.std(correction=0)
    odd = scores > limit + ROUNDING * scores.mean()
    return mean_of(rows, shares, ~(odd if among is None else odd & among), memory=after)


def _three_sigma_assumes(k: int, f: int, width: float, score: str) -> None:
    if score not in ("krum", "median", "foolsgold"):
        raise ConfigError.unknown("score", score, ("krum", "median", "foolsgold"))
    positive("Three sigma", width=width)
    enough("Three sigma", k, f, 2, 3 if score == "krum" else 1)
    if f and width * width >= (k - f) / f:
        raise ConfigError(
            f"Three sigma was given width={width}, K={k} clients and f={f} attackers.",
            f"So many attackers lie at most {math.sqrt((k - f) / f):.3g} sigma above the mean: width must be below.",
        )


def _center(features: torch.Tensor, score: str, f: int) -> torch.Tensor:
    ones = torch.ones(len(features))
    if score == "median":
        return geometric_median(features, ones, f=f).update
    return multi_krum(features, ones, f=f, m=math.ceil(len(features) / 2) - 1).update


# -- with a client's own past ------------------------------------------------------------------------------------------


def cross_round(
    rows: torch.Tensor,
    weights: torch.Tensor,
    *,
    clients: Sequence[str],
    model: torch.Tensor,
    bound: float = 0.7,
    lazy: float | None = None,
    memory: Tensors | None = None,
    columns: slice | None = None,
) -> Verdict:
    """Drops a client whose model has a cosine below `bound` with its own last one or with the global one.

    Compared are models, model + u_i, not changes. A client seen first has no last model, and a global model of zeros
    (LoRA's B at the start) has no direction: neither counts against anybody. Assumes that honest models turn little
    between rounds. It bounds no length: a long step in a familiar direction passes, so clip first. The mean is weighted
    by `weights`. Dropped clients keep the model remembered of them.
    Source: the catalogue.

    Args:
        rows: [K, D].
        weights: [K].
        clients: the id of each row.
        model: [D], the global model the clients started from.
        bound: a cosine, -1 to 1.
        lazy: a client whose model differs from either by less than this in 1 - cosine did no work, and is dropped;
            None where that is not asked.
        memory: client id -> its last model [F].
        columns: what is compared; None for all.
    """
    shares = checked(rows, weights)
    suspect, idle, models = _against_the_past(rows, clients, model, bound, lazy, memory, columns)
    kept = ~(suspect | idle)
    return mean_of(rows, shares, kept, memory=_remembered(memory, clients, models, kept))


def outlier_detection(
    rows: torch.Tensor,
    weights: torch.Tensor,
    *,
    clients: Sequence[str],
    model: torch.Tensor,
    f: int,
    bound: float = 0.7,
    lazy: float | None = None,
    score: Literal["krum", "median"] = "krum",
    width: float = 1.0,
    memory: Tensors | None = None,
    columns: slice | None = None,
) -> Verdict:
    """:func:`cross_round` says who is suspect; only if somebody is, :func:`three_sigma` runs, and drops only suspects.

    Assumes what both do. Idle clients (`lazy`) are dropped without it.
    Source: the catalogue.

    Args:
        rows: [K, D].
        weights: [K].
        clients: the id of each row.
        model: [D], the global model the clients started from.
        f: attackers assumed.
        bound: see :func:`cross_round`.
        lazy: see :func:`cross_round`.
        score: see :func:`three_sigma`.
        width: see :func:`three_sigma`.
        memory: as :func:`cross_round` has it.
        columns: what is compared; None for all.
    """
    shares = checked(rows, weights)
    _three_sigma_assumes(len(rows), f, width, score)
    suspect, idle, models = _against_the_past(rows, clients, model, bound, lazy, memory, columns)
    kept = ~idle
    if bool(suspect.any()):
        kept &= three_sigma(rows, weights, score=score, width=width, f=f, columns=columns, among=suspect).kept
    return mean_of(rows, shares, kept, memory=_remembered(memory, clients, models, kept))


def _against_the_past(
    rows: torch.Tensor,
    clients: Sequence[str],
    model: torch.Tensor,
    bound: float,
    lazy: float | None,
    memory: Tensors | None,
    columns: slice | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Who is suspect [K], who is idle [K], and the compared columns of their models [K, F]."""
    if model.shape != rows.shape[1:]:
        raise ConfigError(f"The global model has shape {tuple(model.shape)}.", f"Expected ({rows.shape[1]},).")
    if not -1.0 <= bound <= 1.0:
        raise ConfigError(f"The bound is {bound}.", "Allowed: a cosine, -1 to 1.")
    if lazy is not None:
        positive("The search for idle clients", lazy=lazy)
    models, held = _known(model + rows, clients, memory, columns)
    start = _columns(model[None], columns)[0]
    both = torch.tensor(
        [[_cosine(now, held.get(client)), _cosine(now, start)] for client, now in zip(clients, models, strict=True)],
        dtype=torch.float64,
    )
    idle = torch.zeros(len(rows), dtype=torch.bool) if lazy is None else (1 - both < lazy).any(1)
    # What has no direction to compare with is nan: neither below the bound nor near 1.
    return (both < bound).any(1) & ~idle, idle, models


def _cosine(now: torch.Tensor, past: torch.Tensor | None) -> float:
    """nan where there is nothing to compare with; 0 where `now` alone is zero."""
    if past is None or not bool(past.any()):
        return math.nan
    now, past = now.double(), past.double()
    length = float(now.norm())
    return float(now @ past) / (length * float(past.norm())) if length else 0.0


def _remembered(memory: Tensors | None, clients: Sequence[str], models: torch.Tensor, kept: torch.Tensor) -> Tensors:
    renewed = {client: models[i].clone() for i, client in enumerate(clients) if kept[i]}
    return {**(memory or {}), **renewed}


# -- residuals ---------------------------------------------------------------------------------------------------------


def residual_reweighting(
    rows: torch.Tensor, weights: torch.Tensor, *, f: int = 0, breadth: float = 2.0, threshold: float = 0.1
) -> Verdict:
    """By coordinate a robust line through the values over their ranks; what lies far off it counts little.

    The line is the repeated median's; with residual r, tau = 1.4826 (1 + 5/(K-1)) median|r| and h the leverage of the
    rank, the confidence is min(1, breadth sqrt(2/K) sqrt(1-h) tau / |r|). Values of a confidence below `threshold` are
    set to the line; a client weighs as the square of its summed confidence, whatever `weights` say. Assumes
    K >= 2f+2 and at least 3, the breakdown of the repeated median. Equal values are ranked by row.
    Source: Fu et al., Attack-Resistant Federated Learning with Residual-based Reweighting, arXiv:1912.11464.

    Args:
        rows: [K, D].
        weights: [K]; not used.
        f: attackers assumed.
        breadth: lambda of the paper; larger lets more values count in full.
        threshold: delta of the paper, 0 to 1.
    """
    checked(rows, weights)
    k = len(rows)
    enough("Residual-based reweighting", k, f, 2, 2 if f else 3)
    positive("Residual-based reweighting", breadth=breadth)
    if not 0.0 <= threshold <= 1.0:
        raise ConfigError(f"The threshold is {threshold}.", "Allowed: 0 to 1.")
    off = torch.arange(k, dtype=torch.float64) - (k - 1) / 2
    leverage = 1 / k + off.square() / off.square().sum()
    reach = breadth * math.sqrt(2 / k) * 1.4826 * (1 + 5 / (k - 1)) * (1 - leverage).sqrt()[:, None]
    corrected, total = torch.empty_like(rows), torch.zeros(k, dtype=torch.float64)
    for place, piece in pieces(rows):
        ordered, order = piece.double().sort(dim=0, stable=True)
        line = _line(ordered)
        gap = (ordered - line).abs()
        gap[gap <= ROUNDING * ordered.abs()] = 0.0
        confidence = (reach * _median(gap) / gap).nan_to_num(nan=1.0, posinf=1.0).clamp_max(1.0)
        values = torch.where(confidence < threshold, line, ordered)
        corrected[:, place] = torch.empty_like(values).scatter_(0, order, values).to(rows.dtype)
        total += torch.empty_like(confidence).scatter_(0, order, confidence).sum(1)
    return mean_of(corrected, torch.ones(k, dtype=torch.float64), (total / total.max().clamp_min(ROUNDING)).square())


def _line(ordered: torch.Tensor) -> torch.Tensor:
    """The repeated-median line through sorted values over ranks, at every rank: [K, columns]."""
    k = len(ordered)
    ranks = torch.arange(k, dtype=torch.float64)[:, None]
    slopes = torch.empty_like(ordered)
    for i in range(k):
        others = [j for j in range(k) if j != i]
        slopes[i] = _median((ordered[others] - ordered[i]) / (ranks[others] - i))
    slope = _median(slopes)
    return _median(ordered - slope * ranks) + slope * ranks


def _median(values: torch.Tensor) -> torch.Tensor:
    """Along dimension 0; of an even number the mean of the two in the middle. NumPy selects where torch would sort."""
    k = len(values)
    columns = numpy.array(values.numpy().T, order="C")
    middle = sorted({(k - 1) // 2, k // 2})
    columns.partition(middle, axis=1)
    return torch.from_numpy(columns[:, middle].mean(1))


# -- noise -------------------------------------------------------------------------------------------------------------


def weak_dp(
    rows: torch.Tensor, weights: torch.Tensor, *, sd: float, rng: torch.Generator, bound: float | None = None
) -> Verdict:
    """The mean, weighted by `weights`, of uploads that are clipped to `bound` and get noise N(0, sd^2) each.

    The weighted mean of K such noises is N(0, sd^2 sum_i share_i^2), and is drawn once. No accounting and no privacy
    guarantee. Assumes what :func:`norm_clip` does; without a bound, noise alone stops no attacker.
    Source: Sun et al., arXiv:1911.07963, section 4.
    """
    shares = checked(rows, weights)
    positive("Weak DP", sd=sd)
    everyone = torch.ones(len(rows), dtype=torch.bool)
    found = mean_of(rows, shares, everyone) if bound is None else norm_clip(rows, weights, bound=bound)
    noise = torch.randn(rows.shape[1], generator=rng, dtype=torch.float64) * (sd * float(shares.norm()))
    note = f"{found.note} The noise is no guarantee of privacy.".strip()
    return Verdict((found.update + noise).to(rows.dtype), found.kept, note)


def crfl_bound(round: int, start: float = 2.0, growth: float = 0.1) -> float:
    """rho_t = start + growth t for :func:`crfl`: the norm allowed to the global model grows with the rounds."""
    return start + growth * round


def crfl(
    rows: torch.Tensor,
    weights: torch.Tensor,
    *,
    model: torch.Tensor,
    rho: float,
    sigma: float,
    rng: torch.Generator,
    last: bool = False,
) -> Verdict:
    """The change that brings the global model to a norm of at most rho, plus noise N(0, sigma^2) but in the last round.

    The mean is weighted by `weights`. No client is dropped, so one attacker decides the direction; the norm bounds
    what it can do. `rho` and `sigma` are for all of the model that `rows` change.
    Source: Xie et al., CRFL, ICML 2021, arXiv:2106.08283, algorithm 1.

    Args:
        rows: [K, D].
        weights: [K].
        model: [D], the global model the clients started from.
        rho: the norm, see :func:`crfl_bound`.
        sigma: standard deviation of the noise.
        rng: draws the noise.
        last: no noise; predictions are smoothed in its place, see :func:`smoothing_radius`.
    """
    shares = checked(rows, weights)
    positive("CRFL", rho=rho, sigma=sigma)
    if model.shape != rows.shape[1:]:
        raise ConfigError(f"The global model has shape {tuple(model.shape)}.", f"Expected ({rows.shape[1]},).")
    after = model.double() + mix(rows, shares)
    factor = float(shrinking(after.norm(), rho))
    noise = 0.0 if last else sigma * torch.randn(len(after), generator=rng, dtype=torch.float64)
    update = (after * factor + noise - model.double()).to(rows.dtype)
    note = f"The global model was shrunk to {factor:.3g} of its norm." if factor < 1 else ""
    return Verdict(update, torch.ones(len(rows), dtype=torch.bool), note)


def smoothing_radius(first: float, second: float, sigma: float) -> float:
    """How far (Euclidean) the last model may be moved without changing a prediction smoothed by N(0, sigma^2).

    sigma / 2 (q(first) - q(second)) with q the normal quantile; 0 where the two do not differ. A radius in parameters:
    what the CRFL paper makes of it for poisoned rows needs bounds on the clients' training that are not known here.
    Source: Cohen et al., ICML 2019, arXiv:1902.02918, theorem 1.

    Args:
        first: a lower bound on the probability of the most frequent answer, within (0, 1).
        second: an upper bound on that of the next, within (0, 1).
        sigma: the noise of the smoothing.
    """
    positive("The radius", sigma=sigma)
    if not (0.0 < first < 1.0 and 0.0 < second < 1.0):
        raise ConfigError(f"The probabilities are {first} and {second}.", "Allowed: above 0 and below 1.")
    quantile = NormalDist().inv_cdf
    return max(sigma / 2 * (quantile(first) - quantile(second)), 0.0)


# -- inside a client's training ----------------------------------------------------------------------------------------


def soteria(
    gradient: torch.Tensor, representation: torch.Tensor, sensitivity: torch.Tensor, *, share: float = 0.01
) -> torch.Tensor:
    """The gradient of a linear layer without the inputs that tell most of the data.

    Zeroed are the ceil(share F) columns with the smallest sum over the batch of ||dr/dx|| / |r|. A unit that is 0 has
    nothing to hide and is never first. Assumes an attacker that inverts this layer's gradient.
    Source: Sun et al., Soteria, CVPR 2021, arXiv:2012.06043, section 4.

    Args:
        gradient: [O, F], of the layer's weight.
        representation: r [B, F], what goes into the layer.
        sensitivity: ||dr/dx|| [B, F], the norm of each unit's gradient in the data.
        share: of units, 0 to 1.

    Raises:
        ConfigError: shapes that do not match, or a share outside [0, 1].
    """
    fits = representation.dim() == 2 and gradient.dim() == 2 and gradient.shape[1] == representation.shape[1]
    if not fits or sensitivity.shape != representation.shape:
        given = ", ".join(str(tuple(t.shape)) for t in (gradient, representation, sensitivity))
        raise ConfigError(f"Soteria was given shapes {given}.", "Allowed: [O, F], [B, F], [B, F].")
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"Soteria was given share={share}.", "Allowed: 0 to 1.")
    size = representation.double().abs()
    ratio = torch.where(size > 0, sensitivity.double() / size, torch.inf).sum(0)
    found = gradient.clone()
    found[:, ratio.argsort(stable=True)[: math.ceil(share * len(ratio) - 1e-9)]] = 0.0
    return found


def wbc(
    step: torch.Tensor, before: torch.Tensor | None, *, lr: float, scale: float, rng: torch.Generator
) -> torch.Tensor:
    """A local step with Laplace noise lr m in the entries where |step - before| <= |lr m|.

    Where steps hardly change the loss is flat, and what an attacker planted stays; there the noise wears it off. The
    first step has no step before and stays as it is. Assumes an honest client; it protects nobody else's training.
    Source: Sun et al., FL-WBC, NeurIPS 2021, arXiv:2110.13864, algorithm 1 (which compares with lr m, whose sign is
    chance: its size is meant).

    Args:
        step: the change of the weights in this step.
        before: that of the step before, as it was without noise; None in the first.
        lr: the learning rate.
        scale: of the Laplace distribution; its standard deviation is sqrt(2) scale.
        rng: draws the noise.

    Raises:
        ConfigError: two shapes, or a learning rate or scale that is not above 0.
    """
    positive("FL-WBC", lr=lr, scale=scale)
    if before is None:
        return step.clone()
    if before.shape != step.shape:
        raise ConfigError(f"FL-WBC was given steps of {tuple(step.shape)} and {tuple(before.shape)}.", "One shape.")
    one, other = (torch.empty_like(step).exponential_(generator=rng) for _ in range(2))
    noise = lr * scale * (one - other)  # of two exponentials the difference is Laplace's
    return torch.where((step - before).abs() <= noise.abs(), step + noise, step)
