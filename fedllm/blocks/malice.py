"""Malice - what a dishonest client uploads, and how it poisons its rows, so that defences can be tried.

Attacks on uploads are pure functions of one update [D], the client's change of the global model; an attack that
uploads chosen weights w is the update w - model. Attacks on data are pure functions of rows of text. What is drawn
comes from a generator that is given; who attacks and when is the caller's.

Source: FedSecurity, Han et al., KDD 2024, arXiv:2306.04959 (the catalogue); each attack names its own paper.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, Literal

import numpy
import torch

from fedllm.blocks.robust import checked, mix
from fedllm.core.errors import ConfigError, DataError, nearest

Row = dict[str, Any]


def chosen(clients: Sequence[str], f: int, rng: numpy.random.Generator) -> list[str]:
    """f of the clients, drawn without replacement and sorted: who attacks in a round.

    Raises:
        ConfigError: f is below 0 or above the number of clients.
    """
    if not 0 <= f <= len(clients):
        raise ConfigError(f"{f} of {len(clients)} clients are to attack.", f"Allowed: 0 to {len(clients)}.")
    return sorted(clients[int(i)] for i in rng.permutation(len(clients))[:f])


# -- uploads -----------------------------------------------------------------------------------------------------------


def byzantine_zero(model: torch.Tensor) -> torch.Tensor:
    """Weights that are all zero: the update -model. Source: the catalogue."""
    return -model


def byzantine_random(model: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Weights drawn from [-1, 1): the update w - model. Source: the catalogue."""
    return 2 * torch.rand(model.shape, generator=rng, dtype=model.dtype) - 1 - model


def sign_flip(update: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """The update turned round and stretched, -factor u. Source: the catalogue."""
    return scaled(update, -_finite("factor", factor))


def scaled(update: torch.Tensor, factor: float) -> torch.Tensor:
    """factor u. Raises :class:`ConfigError` for a factor that is not finite."""
    return _finite("factor", factor) * update


def model_replacement(
    wanted: torch.Tensor,
    weights: torch.Tensor,
    attacker: int,
    others: torch.Tensor | None = None,
) -> torch.Tensor:
    """The update of one client that makes the weighted mean the update `wanted`.

    It is (wanted - sum_j share_j u_j) / share; with equal weights and nothing known of the others, K wanted. Assumes
    the weighted mean, and that the others send what `others` says, or nothing (as near the end of training).
    Source: Bagdasaryan et al., How To Backdoor Federated Learning, AISTATS 2020, arXiv:1807.00459, section 4.

    Args:
        wanted: [D], the wanted model minus the global one.
        weights: [K], as the server will use them.
        attacker: whose row it is.
        others: [K, D], what all send (the attacker's own row does not matter); None for zeros.

    Raises:
        ConfigError: no such row, a weight of zero, or shapes that do not match.
    """
    given = torch.zeros(len(weights), len(wanted), dtype=wanted.dtype) if others is None else others
    shares = checked(given, weights)
    if given.shape[1:] != wanted.shape or not 0 <= attacker < len(weights):
        raise ConfigError(
            f"Client {attacker} is to replace a model of shape {tuple(wanted.shape)}.",
            f"Rows: 0 to {len(weights) - 1}, each of shape {tuple(given.shape[1:])}.",
        )
    own = float(shares[attacker])
    if not own:
        raise ConfigError(f"Client {attacker} has weight 0.", "Only a client that counts can replace the model.")
    rest = shares.clone()
    rest[attacker] = 0.0
    return ((wanted.double() - mix(given, rest)) / own).to(wanted.dtype)


def train_and_scale(update: torch.Tensor, bound: float) -> torch.Tensor:
    """The update with the norm `bound`: as strong as one that clips at it, or looks at norms, lets pass.

    Source: Bagdasaryan et al., arXiv:1807.00459, section 4.

    Raises:
        ConfigError: a bound that is not above 0, or an update of zeros, which has no direction.
    """
    length = float(update.double().norm())
    if not (math.isfinite(bound) and bound > 0) or not (math.isfinite(length) and length > 0):
        raise ConfigError(f"An update of norm {length} is to get the norm {bound}.", "Both must be above 0.")
    return (update.double() * (bound / length)).to(update.dtype)


def alie_width(k: int, f: int) -> float:
    """z of :func:`alie`: so many standard deviations from the mean, more than half the votes are still on that side.

    With s = floor(k/2 + 1) - f honest supporters needed, z is the normal quantile of (k - f - s) / (k - f). Assumes
    1 <= f < k / 2. For some small k it is negative: there is no room, and 0 is given.
    Source: Baruch et al., A Little Is Enough, NeurIPS 2019, arXiv:1902.06156, section 3.
    """
    if not 1 <= f < k / 2:
        raise ConfigError(f"{f} of {k} clients attack.", "Allowed: 1 to below half.")
    share = (k - f - (k // 2 + 1 - f)) / (k - f)
    return max(NormalDist().inv_cdf(share), 0.0) if share > 0 else 0.0


def alie(colluders: torch.Tensor, wanted: torch.Tensor | None = None, *, width: float) -> torch.Tensor:
    """The update each colluder sends: `wanted` held to mean +- width std of their honest updates in every coordinate.

    Without a wanted update it is mean - width std. Assumes that the colluders' updates look like the honest ones.
    Source: Baruch et al., arXiv:1902.06156, algorithms 2 and 3.

    Args:
        colluders: [C, D], what the colluders would send if they were honest.
        wanted: [D].
        width: z, see :func:`alie_width`.

    Raises:
        ConfigError: no colluder, a negative width, or a wanted update of another shape.
    """
    if colluders.dim() != 2 or not len(colluders) or not (math.isfinite(width) and width >= 0):
        raise ConfigError(
            f"The colluders' updates have shape {tuple(colluders.shape)}, width={width}.", "[C, D], 0 or more."
        )
    wide = colluders.double()
    middle, room = wide.mean(0), width * wide.std(0, correction=0)
    if wanted is None:
        return (middle - room).to(colluders.dtype)
    if wanted.shape != middle.shape:
        raise ConfigError(f"The wanted update has shape {tuple(wanted.shape)}.", f"Expected {tuple(middle.shape)}.")
    return wanted.double().clamp(middle - room, middle + room).to(colluders.dtype)


def lazy_worker(
    last: torch.Tensor,
    model: torch.Tensor,
    *,
    mask: Literal["none", "uniform", "gaussian"] = "none",
    scale: float = 0.0,
    rng: torch.Generator | None = None,
) -> torch.Tensor:
    """The update of a free rider that trains nothing: earlier weights again, perhaps under a mask of noise.

    Source: the catalogue.

    Args:
        last: [D], its own weights of the round before, or the global ones.
        model: [D], the global model it has received.
        mask: noise from [-scale, scale), from N(0, scale^2), or none.
        scale: see `mask`.
        rng: draws the mask.

    Raises:
        ConfigError: two shapes, an unknown mask, a mask without scale or generator, or a scale without a mask.
    """
    if last.shape != model.shape:
        raise ConfigError(f"The last weights have shape {tuple(last.shape)}.", f"Expected {tuple(model.shape)}.")
    if mask not in ("none", "uniform", "gaussian"):
        raise ConfigError.unknown("mask", mask, ("none", "uniform", "gaussian"))
    if mask == "none":
        if scale:
            raise ConfigError(f"A scale of {scale} has no mask to go with.", action="Set mask to 'gaussian'.")
        return last - model
    if rng is None or not (math.isfinite(scale) and scale > 0):
        raise ConfigError(f"The mask '{mask}' was given scale={scale}.", "It needs a scale above 0, and 'rng'.")
    if mask == "gaussian":
        return last - model + scale * torch.randn(model.shape, generator=rng, dtype=model.dtype)
    return last - model + scale * (2 * torch.rand(model.shape, generator=rng, dtype=model.dtype) - 1)


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ConfigError(f"{name} is {value}.", "Allowed: a finite number.")
    return value


# -- rows --------------------------------------------------------------------------------------------------------------


def label_flip(
    rows: Sequence[Mapping[str, Any]], mapping: Mapping[Hashable, Hashable], *, label: str = "label"
) -> list[Row]:
    """Copies of the rows with labels replaced as `mapping` says; other labels stay.

    Source: Tolpegin et al., Data Poisoning Attacks Against Federated Learning, ESORICS 2020, arXiv:2007.08432.

    Args:
        rows: a client's training rows.
        mapping: original -> false label, one to one.
        label: the column.

    Raises:
        ConfigError: the mapping is empty, not one to one, or maps a label to itself.
        DataError: a row has no such column.
    """
    same = next((old for old, new in mapping.items() if old == new), None)
    if not mapping or len(set(mapping.values())) < len(mapping) or same is not None:
        raise ConfigError(
            f"Labels are to be flipped by {dict(mapping)}.",
            "Allowed: at least one label, each to another one, no two to the same.",
        )
    return [{**row, label: mapping.get(_cell(row, label), row[label])} for row in rows]


def usualness(texts: Sequence[str]) -> list[float]:
    """The mean log-probability of each text's words under the counts of all of them; of no word, minus infinity.

    The simplest model of clean data there is: it needs no other model, and a text of rare words is rare under it.
    """
    words = [text.lower().split() for text in texts]
    counts = Counter(word for each in words for word in each)
    total = max(counts.total(), 1)
    return [sum(math.log(counts[w] / total) for w in each) / len(each) if each else -math.inf for each in words]


def rare_rows(scores: Sequence[float], share: float) -> list[int]:
    """The numbers of the floor(share n) rows with the lowest scores, rarest first, equal scores by number.

    Scores say how usual a row is: its log-likelihood under a model of the clean data, or a density of its embedding.

    Raises:
        ConfigError: a share outside [0, 1].
        DataError: a score that is not a number.
    """
    bad = next((i for i, score in enumerate(scores) if math.isnan(score)), None)
    if bad is not None:
        raise DataError(f"The score of row {bad} is not a number.")
    return sorted(range(len(scores)), key=lambda i: (scores[i], i))[: _share(share, len(scores))]


def edge_case_rows(
    rows: Sequence[Mapping[str, Any]],
    rare: Sequence[Mapping[str, Any]],
    *,
    target: Any,
    fraction: float,
    batch: int,
    rng: numpy.random.Generator,
    label: str = "label",
) -> list[Row]:
    """Copies of the rows with floor(fraction b) of every batch of b replaced by rare rows that have `target`.

    Rare rows come in a drawn order, again from the first when all were used. Assumes that batches are taken in order,
    and that rare inputs are not in honest data: then honest updates do not undo the attack.
    Source: Wang et al., Attack of the Tails, NeurIPS 2020, arXiv:2007.05084, section 3.

    Args:
        rows: a client's training rows.
        rare: rows from the tail, see :func:`rare_rows`.
        target: the answer they are to get.
        fraction: of every batch, 0 to 1; the last batch may be smaller.
        batch: its size.
        rng: draws the order of the rare rows and the places.
        label: the column that gets the target.

    Raises:
        ConfigError: a fraction outside [0, 1] or a batch below 1.
        DataError: no rare rows, or a column is missing.
    """
    if batch < 1:
        raise ConfigError(f"The batch is {batch}.", "Allowed: 1 or more.")
    _share(fraction, 0)
    if not rare:
        raise DataError("There are no rare rows to put in.", action="Raise the share of rare rows.")
    for row in rare:
        _cell(row, label)
    order, used = rng.permutation(len(rare)).tolist(), 0
    found = [dict(row) for row in rows]
    for start in range(0, len(rows), batch):
        size = min(batch, len(rows) - start)
        for at in sorted(rng.permutation(size)[: _share(fraction, size)].tolist()):
            found[start + at] = {**rare[order[used % len(rare)]], label: target}
            used += 1
    return found


def _share(fraction: float, n: int) -> int:
    """floor(fraction n), where 0.29 of 100 is 29; raises :class:`ConfigError` outside [0, 1]."""
    if not 0.0 <= fraction <= 1.0:
        raise ConfigError(f"The fraction is {fraction}.", "Allowed: 0 to 1.")
    return math.floor(fraction * n + 1e-9)


def _cell(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise DataError(f"A row has no column '{column}'.", f"Columns: {', '.join(row)}.", nearest(column, row))
    return row[column]
