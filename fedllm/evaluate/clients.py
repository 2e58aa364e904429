"""Clients - what a metric says of each client, not only of all together.

A federation is judged by whom it serves: the mean over clients, the spread, the worst tenth, and how many do better
than with what they could have had alone. Intervals come from drawing clients anew, since it is clients, not rows,
that a federation samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy

from fedllm.core.errors import ConfigError, DataError

DRAWS = 2000
"""Bootstrap draws."""
BLOCK = 4_000_000
"""Entries of the largest array of a bootstrap."""
Scores = Mapping[str, Mapping[str, float | None]]
"""Client id -> metric -> value (None where it was not measured), with the examples under `n`."""


@dataclass(frozen=True)
class Gain:
    """What clients gain over a reference, positive where they do better, in the metric's own unit.

    Attributes:
        clients: clients measured on both sides.
        mean: uniform mean of the gains.
        interval: 95 % bootstrap interval of the mean; None for one client.
        improved: share of clients with a gain above 0.
        worsened: share of clients with a gain below 0.
    """

    clients: int
    mean: float
    interval: tuple[float, float] | None
    improved: float
    worsened: float


@dataclass(frozen=True)
class Summary:
    """A metric over clients; what cannot be computed is None, and `reason` says why where nothing can.

    "Worst" is the low end where higher is better, and the high end otherwise.

    Attributes:
        metric: the metric.
        higher_is_better: its direction.
        clients: clients with a value.
        missing: clients without one, sorted.
        reason: why there are no values at all.
        weighted_mean: mean with each client's weight (its examples); None where weights are unknown or all 0.
        mean: mean with equal weights.
        std: standard deviation of these clients (divisor K).
        min, max: smallest and largest value.
        percentile_10: the value that a tenth of the clients do worse than (linear between two clients).
        worst_10_percent: mean of the worst tenth of the clients (at least one client).
        jain: Jain's index (sum s)^2 / (K sum s^2): 1 where all are equal, 1/K where one has everything; None where
            all are 0.
        interval: 95 % bootstrap interval of `mean` over clients; None for one client.
        weighted_interval: the same of `weighted_mean`.
        gain: over the reference, where one was given.
    """

    metric: str
    higher_is_better: bool
    clients: int
    missing: list[str]
    reason: str | None = None
    weighted_mean: float | None = None
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    percentile_10: float | None = None
    worst_10_percent: float | None = None
    jain: float | None = None
    interval: tuple[float, float] | None = None
    weighted_interval: tuple[float, float] | None = None
    gain: Gain | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self, dict_factory=_plain)


def summarise(
    per_client: Scores,
    metric: str,
    weights: Mapping[str, float] | None = None,
    reference: Scores | None = None,
    higher_is_better: bool = True,
    seed: int = 0,
) -> Summary:
    """Summarise one metric; the order of the clients does not matter.

    Args:
        per_client: values by client.
        metric: which of them.
        weights: client -> weight; each client's `n` where None.
        reference: values of the same metric with another model (local, base), for the gain.
        higher_is_better: the metric's direction.
        seed: of the bootstrap.

    Raises:
        ConfigError: a client without the metric's name, or without a weight in `weights`.
        DataError: a value that is not finite, or a negative weight.
    """
    found = {client: _value(client, per_client[client], metric) for client in sorted(per_client)}
    known = {client: value for client, value in found.items() if value is not None}
    missing = [client for client in found if client not in known]
    if not known:
        reason = "No client has a value." if found else "No client was measured."
        return Summary(metric, higher_is_better, 0, missing, reason)
    values = numpy.array(list(known.values()), numpy.float64)
    shares = _weights(known, per_client, weights)
    worst = numpy.sort(values) if higher_is_better else numpy.sort(values)[::-1]
    squares = float((values**2).sum())
    equal = numpy.ones(len(values))
    return Summary(
        metric,
        higher_is_better,
        len(values),
        missing,
        None,
        float((values * shares).sum() / shares.sum()) if shares is not None else None,
        float(values.mean()),
        float(values.std()),
        float(values.min()),
        float(values.max()),
        float(numpy.percentile(values, 10 if higher_is_better else 90)),
        float(worst[: math.ceil(len(values) / 10)].mean()),
        min(1.0, float(values.sum()) ** 2 / (len(values) * squares)) if squares else None,
        bootstrap(values, equal, seed),
        bootstrap(values, shares, seed) if shares is not None else None,
        _gain(known, reference, metric, higher_is_better, seed) if reference is not None else None,
    )


def bootstrap(
    values: numpy.ndarray, weights: numpy.ndarray, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float] | None:
    """The 2.5 % and 97.5 % quantiles of the weighted mean over clients drawn anew with replacement.

    Args:
        values: shape [clients].
        weights: shape [clients]; a draw whose weights are all 0 is left out.
        seed: of the generator; the same seed gives the same interval.
        draws: how many.

    Returns:
        Low and high; None for fewer than two clients.
    """
    size = len(values)
    if size < 2:
        return None
    stream = numpy.random.default_rng(seed)
    means, step = [], max(1, BLOCK // size)
    for first in range(0, draws, step):
        chosen = stream.integers(0, size, (min(step, draws - first), size))
        drawn = weights[chosen]
        total = drawn.sum(1)
        means.append(((values[chosen] * drawn).sum(1)[total > 0]) / total[total > 0])
    low, high = numpy.quantile(numpy.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def _gain(known: Mapping[str, float], reference: Scores, metric: str, higher: bool, seed: int) -> Gain | None:
    """The gain over a reference at the clients that both know; None where there is none."""
    before = {client: _value(client, reference[client], metric) for client in known if client in reference}
    pairs = [(known[client], value) for client, value in before.items() if value is not None]
    if not pairs:
        return None
    gains = numpy.array([now - then if higher else then - now for now, then in pairs], numpy.float64)
    interval = bootstrap(gains, numpy.ones(len(gains)), seed)
    return Gain(len(gains), float(gains.mean()), interval, float((gains > 0).mean()), float((gains < 0).mean()))


def _value(client: str, values: Mapping[str, float | None], metric: str) -> float | None:
    if metric not in values:
        raise ConfigError.unknown(f"metric of client {client}", metric, [name for name in values if name != "n"])
    value = values[metric]
    if value is not None and not math.isfinite(value):
        raise DataError(
            f"The {metric} of client {client} is {value}.",
            "A value must be finite, or None where it was not measured.",
        )
    return value


def _weights(
    known: Mapping[str, float], per_client: Scores, weights: Mapping[str, float] | None
) -> numpy.ndarray | None:
    """Weights in the order of `known`; None where no weights were given and a client has no `n`, or all are 0."""
    if weights is None:
        found: Sequence[float | None] = [per_client[client].get("n") for client in known]
    else:
        lacking = [client for client in known if client not in weights]
        if lacking:
            raise ConfigError(f"The client {lacking[0]} has no weight.", "Weights name every client that has a value.")
        found = [weights[client] for client in known]
    if any(weight is None for weight in found):
        return None
    shares = numpy.array(found, numpy.float64)
    if not numpy.isfinite(shares).all() or (shares < 0).any():
        raise DataError("A client's weight is negative or not finite.", "Weights are 0 or more.")
    return shares if shares.sum() > 0 else None


def _plain(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Tuples as lists, at every depth."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}
