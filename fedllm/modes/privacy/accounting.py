"""Accounting - what releases cost in (epsilon, delta), and how much noise a budget needs.

A release is a :class:`Sampled` sum (units joined by independent coins), a :class:`FixedSize` one (so many units were
drawn without replacement), or a whole :class:`TreeRun` of DP-FTRL. Everywhere `noise` is the standard deviation of the
noise divided by the clipping bound, whatever the neighbouring relation.

Sources: Abadi et al., Deep Learning with Differential Privacy, CCS 2016; Koskela et al., Computing Tight Differential
Privacy Guarantees Using FFT, AISTATS 2020, and Doroshenko et al., Connect the Dots, PoPETs 2022 (privacy loss
distributions); Mironov et al., Renyi Differential Privacy of the Sampled Gaussian Mechanism, 2019; Wang, Balle and
Kasiviswanathan, Subsampled Renyi Differential Privacy, AISTATS 2019, theorem 27 (fixed size); Balle and Wang, Improving
the Gaussian Mechanism, ICML 2018, theorem 8 (no sampling); Kairouz et al., Practical and Private (Deep) Learning
Without Sampling or Shuffling, ICML 2021, appendix D (trees); Andrew et al., Differentially Private Learning with
Adaptive Clipping, NeurIPS 2021, theorem 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from fedllm.core.errors import ConfigError, MissingExtra, RunError, nearest
from fedllm.core.message import Json

Relation = Literal["add-or-remove-one", "zero-out-one", "replace-one"]
"""Which data sets count as neighbours: one unit more or less, one unit's contributions set to zero, or one replaced."""
NOISE_LIMIT = 2.0**20
"""No solution for the noise is looked for beyond this multiple of the clipping bound."""
TOLERANCE = 1e-3
"""The noise that is solved for leaves at most this share of epsilon unused."""
COARSE = 1000.0
"""Above this epsilon by the Renyi figure nothing is promised anyway, and the tight figure is not computed."""
# Orders below 2 do not converge in dp-accounting at common rates, and matter only where epsilon is far above 10.
_ORDERS = [*(2 + tenth / 10 for tenth in range(90)), *range(11, 65), 80, 96, 128, 192, 256, 512, 1024]


@dataclass(frozen=True)
class Sampled:
    """A clipped sum with Gaussian noise, over units that each joined by a coin of their own (Poisson sampling).

    Args:
        noise: standard deviation / clipping bound; 0 promises nothing.
        rate: the chance that a unit joined; 1 for all of them (the plain Gaussian mechanism).
    """

    noise: float
    rate: float = 1.0

    def __post_init__(self) -> None:
        _check_noise(self.noise)
        if not 0 < self.rate <= 1:
            raise ConfigError(f"The sampling rate is {self.rate}.", "A rate is above 0 and at most 1.")


@dataclass(frozen=True)
class FixedSize:
    """A clipped sum with Gaussian noise, over a set of fixed size drawn without replacement.

    Neighbours replace one unit by another, so the sum moves by up to twice the clipping bound, and half the noise
    counts. An accountant that is given `noise` itself here, as a ratio to a sensitivity of one bound, reports too
    small an epsilon.

    Args:
        noise: standard deviation / clipping bound; 0 promises nothing.
        size: units drawn.
        population: units there are.
    """

    noise: float
    size: int
    population: int

    def __post_init__(self) -> None:
        _check_noise(self.noise)
        if not 1 <= self.size <= self.population:
            raise ConfigError(f"{self.size} of {self.population} units are drawn.", "Allowed: from 1 to all of them.")


@dataclass(frozen=True)
class TreeRun:
    """All releases of one tree of DP-FTRL. Neighbours set one unit's contributions to zero.

    Args:
        noise: standard deviation of one node / clipping bound; 0 promises nothing.
        steps: leaves of the tree, with those that only fill it up.
        participations: steps that one unit takes part in, at most.
        separation: steps from one participation of a unit to its next, at least.
    """

    noise: float
    steps: int
    participations: int = 1
    separation: int = 1

    def __post_init__(self) -> None:
        _check_noise(self.noise)
        for name in ("steps", "participations", "separation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"A tree has {name}={getattr(self, name)}.", "Allowed: 1 and more.")


Event = Sampled | FixedSize | TreeRun
KINDS: dict[str, type[Sampled] | type[FixedSize] | type[TreeRun]] = {
    "sampled": Sampled,
    "fixed-size": FixedSize,
    "tree": TreeRun,
}
"""The name of each kind in JSON."""
Releases = Iterable[tuple[Event, int]]
"""Events, and how often each happened."""


@dataclass(frozen=True)
class Spent:
    """What releases have cost. No figure means anything without the others.

    Attributes:
        epsilon: the bound; infinite where something was released without noise.
        delta: the chance of more.
        rdp: the same by Renyi orders: a second opinion, as a rule larger. It is below `epsilon` only by the grid of the
            tight figure.
        relation: which data sets count as neighbours.
        accountant: what gave `epsilon`: "pld" (a privacy loss distribution, rounded upwards), "analytic" (exact: the
            Gaussian mechanism without sampling) or "rdp" (the same figure as `rdp`).
    """

    epsilon: float
    delta: float
    rdp: float
    relation: Relation
    accountant: Literal["pld", "analytic", "rdp"]


def spent(releases: Releases, delta: float) -> Spent:
    """The cost of all `releases` together, each chosen with knowledge of those before.

    Args:
        releases: events with their numbers; 0 leaves an event out.
        delta: from 0 to 1, both excluded.

    Raises:
        ConfigError: events whose neighbouring relations differ, or a delta out of range.
        MissingExtra: dp-accounting is not installed.
    """
    check_delta(delta)
    return _spent(_merged(releases), delta)


def renyi_epsilon(releases: Releases, delta: float) -> float:
    """The second opinion alone, which is quick: also an upper bound. See :func:`spent`."""
    check_delta(delta)
    return _renyi(_merged(releases), delta)


def relation_of(releases: Releases) -> Relation:
    """The neighbouring relation under which all `releases` can be accounted together.

    Raises:
        ConfigError: sets of fixed size together with other events.
    """
    kinds = {type(event) for event, count in releases if count}
    if FixedSize in kinds and len(kinds) > 1:
        raise ConfigError(
            "Sets of fixed size and other releases are accounted together.",
            "Sets of fixed size are accounted by replacing one unit, the others by leaving one out.",
            action="Use one way of sampling throughout a run.",
        )
    if FixedSize in kinds:
        return "replace-one"
    return "zero-out-one" if TreeRun in kinds else "add-or-remove-one"


def noise_for(epsilon: float, delta: float, steps: int, rate: float = 1.0) -> float:
    """The least noise, in clipping bounds, with which `steps` Poisson samples keep to (epsilon, delta).

    Args:
        epsilon: above 0.
        delta: from 0 to 1, both excluded.
        steps: releases.
        rate: the chance that a unit joins one of them.

    Returns:
        A noise whose cost by :func:`spent` is at most `epsilon`, and at least 0.999 times it where that can be had.

    Raises:
        ConfigError: an argument out of range, or a budget that no noise keeps to.
    """
    if steps < 1:
        raise ConfigError(f"Noise for {steps} releases is asked for.", "Allowed: 1 and more.")
    return solve(lambda noise: [(Sampled(noise, rate), steps)], epsilon, delta)


def solve(plan: Callable[[float], Releases], epsilon: float, delta: float) -> float:
    """The least noise with which a plan keeps to (epsilon, delta); never one that passes it.

    The cost falls as the noise grows. The answer is the upper end of a bracket, whose cost was computed and is within
    the budget; the lower end's is not.

    Args:
        plan: from the noise to the releases it is for.
        epsilon: above 0.
        delta: from 0 to 1, both excluded.

    Raises:
        ConfigError: see :func:`noise_for`.
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ConfigError(f"Noise for epsilon={epsilon} is asked for.", "Allowed: numbers above 0.")

    def cost(noise: float) -> float:
        return spent(plan(noise), delta).epsilon

    high = 1.0
    while (above := cost(high)) > epsilon:
        high *= 2
        if high > NOISE_LIMIT:
            raise ConfigError(
                f"No noise up to {NOISE_LIMIT:.0f} times the clipping bound keeps to epsilon={epsilon:g} and "
                f"delta={delta:g}.",
                action="Raise epsilon or delta, or take fewer steps.",
            )
    low = high / 2
    while (below := cost(low)) <= epsilon:
        high, above, low = low, below, low / 2
        if low < 1 / NOISE_LIMIT:
            return high
    halve = False
    while above < epsilon * (1 - TOLERANCE) and high / low - 1 > TOLERANCE / 100:
        middle = math.sqrt(low * high) if halve else _between(low, high, below, above, epsilon)
        found, halve = cost(middle), not halve
        if found <= epsilon:
            high, above = middle, found
        else:
            low, below = middle, found
    return high


def split_noise(total: float, count: float) -> float:
    """The noise that updates get where counting those within an adaptive bound takes its share (Andrew et al.).

    z_D = (z^-2 - (2 s)^-2)^(-1/2): one release of updates and count together then costs what `total` alone would. It
    holds for a sum of bits of +1/2 and -1/2, which one unit moves by 1/2. A sum of bits of 0 and 1 moves by 1 and
    would cost more: see :class:`fedllm.modes.privacy.mechanism.AdaptiveClip`.

    Args:
        total: z, the noise to be accounted, as a multiple of the clipping bound.
        count: s, the standard deviation of the noise on the sum of the bits.

    Returns:
        z_D, as a multiple of the clipping bound; larger than `total`.

    Raises:
        ConfigError: a count noise of at most total / 2, which alone spends everything.
    """
    _check_noise(total)
    if total == 0:
        return 0.0
    if not 2 * count > total:
        raise ConfigError(
            f"The noise on the count is {count:g} and the noise in all {total:g}: the count alone would spend it.",
            f"Allowed: a noise on the count above {total / 2:g}.",
            action="Raise the noise on the count.",
        )
    return (total**-2 - (2 * count) ** -2) ** -0.5


def joined_noise(updates: float, count: float) -> float:
    """The other way round: the noise to be accounted, from what the updates and the sum of the bits really got."""
    _check_noise(updates)
    _check_noise(count)
    return (updates**-2 + (2 * count) ** -2) ** -0.5 if updates and count else 0.0


def gaussian_delta(mu: float, epsilon: float) -> float:
    """delta of the Gaussian mechanism with mu = sensitivity / standard deviation (Balle and Wang, theorem 8).

    Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu).
    """
    from scipy.special import log_ndtr, ndtr  # pyright: ignore[reportMissingTypeStubs]

    if mu == 0:
        return 0.0
    second = math.exp(min(0.0, epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))))
    return max(0.0, float(ndtr(mu / 2 - epsilon / mu)) - second)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The least epsilon of the Gaussian mechanism at `delta`, rounded upwards; see :func:`gaussian_delta`."""
    check_delta(delta)
    if math.isinf(mu) or gaussian_delta(mu, 0.0) <= delta:
        return math.inf if math.isinf(mu) else 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(mu, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if gaussian_delta(mu, middle) <= delta else (middle, high)
    return high


def tree_sensitivity(steps: int, participations: int = 1, separation: int = 1) -> float:
    """How far one unit moves all nodes of a tree together, in clipping bounds: an upper bound over its choice of steps.

    A unit that takes part in k steps at least `separation` apart counts at most c = min(k, ceil(2^h / separation))
    times in one node of height h, and k times in all of them, so the squares of its counts at that height sum to at
    most k c. With one participation this is exact: the square root of the tree's height, ceil(log2(steps + 1)).
    """
    TreeRun(1.0, steps, participations, separation)
    k = min(participations, math.ceil(steps / separation))
    return math.sqrt(sum(k * min(k, math.ceil(2**height / separation)) for height in range(steps.bit_length())))


def participation_sensitivity(steps: int, at: Sequence[int]) -> float:
    """The same for a unit that took part in the steps `at` (from 0), exactly where its contributions point one way.

    Only nodes whose leaves have all been are counted: no other node's noise is ever drawn.
    """
    if any(not 0 <= step < steps for step in at):
        raise ConfigError(f"A participation in step {max(at)} of {steps}.", f"Steps are from 0 to {steps - 1}.")
    squares = 0
    for height in range(steps.bit_length()):
        nodes = Counter(step >> height for step in at)
        squares += sum(n * n for node, n in nodes.items() if (node + 1) << height <= steps)
    return math.sqrt(squares)


def check_delta(delta: float, units: int | None = None) -> None:
    """Refuse a delta that promises nothing.

    Args:
        delta: the chance of more than epsilon.
        units: how many units are protected, where known: a mechanism that publishes one of them whole has delta =
            1 / units.

    Raises:
        ConfigError: not between 0 and 1, or at least 1 / units.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta:g} is given.", "Allowed: above 0 and below 1.")
    if units is not None and delta * units >= 1:
        raise ConfigError(
            f"delta={delta:g} is given for {units} protected units: publishing one of them whole would be allowed.",
            f"Allowed: below {1 / max(units, 1):g}.",
            action=f"Set privacy.delta={0.1 / max(units, 1):.1g}.",
        )


def event_to_json(event: Event) -> dict[str, Json]:
    """Plain data of an event, with its kind."""
    return {"kind": next(name for name, kind in KINDS.items() if type(event) is kind), **asdict(event)}


def event_from_json(facts: Any) -> Event:
    """The event of :func:`event_to_json`; raises :class:`RunError` for anything else."""
    kind = facts.get("kind") if isinstance(facts, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise RunError(
            f"A release of the kind {kind!r} is recorded.",
            f"Kinds: {', '.join(KINDS)}.",
            nearest(str(kind), KINDS),
            "Go on with the version of fedllm that wrote it.",
        )
    try:
        return KINDS[kind](**{name: value for name, value in facts.items() if name != "kind"})
    except (TypeError, ConfigError) as fault:
        raise RunError(f"A recorded release cannot be read: {fault}") from fault


def _check_noise(noise: float) -> None:
    if not (noise >= 0 and math.isfinite(noise)):
        raise ConfigError(f"The noise is {noise}.", "Allowed: 0 and more, as a multiple of the clipping bound.")


Merged = tuple[tuple[Event, int], ...]


def _merged(releases: Releases) -> Merged:
    """Equal events together, in an order of their own, so that equal costs are computed once."""
    counts: Counter[Event] = Counter()
    for event, count in releases:
        if count < 0:
            raise ConfigError(f"A release is counted {count} times.", "Allowed: 0 and more.")
        counts[event] += count
    found = tuple(sorted(((e, n) for e, n in counts.items() if n), key=repr))
    relation_of(found)
    return found


def _gaussian_mu(event: Event) -> float | None:
    """sensitivity / standard deviation where the event is a Gaussian mechanism without sampling; else None."""
    if isinstance(event, TreeRun):
        return tree_sensitivity(event.steps, event.participations, event.separation) / event.noise
    return 1 / event.noise if isinstance(event, Sampled) and event.rate == 1 else None


def _parted(releases: Merged) -> tuple[float, list[tuple[Event, int]]]:
    """All plain Gaussian mechanisms as one (their squared mu add up), and the other events."""
    known = [(_gaussian_mu(event), event, count) for event, count in releases]
    mu = math.sqrt(sum(count * found**2 for found, _, count in known if found is not None))
    return mu, [(event, count) for found, event, count in known if found is None]


@lru_cache(maxsize=4096)
def _spent(releases: Merged, delta: float) -> Spent:
    relation, rdp = relation_of(releases), _renyi(releases, delta)
    if math.isinf(rdp):
        return Spent(rdp, delta, rdp, relation, "rdp")
    mu, sampled = _parted(releases)
    if not sampled:
        return Spent(gaussian_epsilon(mu, delta), delta, rdp, relation, "analytic")
    if rdp > COARSE or relation == "replace-one":
        return Spent(rdp, delta, rdp, relation, "rdp")
    return Spent(_loss_epsilon(mu, sampled, delta, rdp), delta, rdp, relation, "pld")


def _loss_epsilon(mu: float, sampled: list[tuple[Event, int]], delta: float, rdp: float) -> float:
    """epsilon by privacy loss distributions, rounded upwards on a grid.

    A grid of h adds at most about h^2 / 4 to the variance of the loss of one release, which is near (rate / noise)^2:
    h = rate / noise / 20 adds less than a thousandth. Where epsilon is large a coarser one does.
    """
    dp = _library()
    from dp_accounting.pld import PLDAccountant  # pyright: ignore[reportMissingTypeStubs]

    scale = min(event.rate / event.noise for event, _ in sampled if isinstance(event, Sampled))
    grid = min(max(scale / 20, 1e-4), 1e-3) * max(rdp / 20, 1.0)
    accountant = PLDAccountant(value_discretization_interval=grid)
    if mu:
        accountant.compose(dp.GaussianDpEvent(1 / mu))
    for event, count in sampled:
        accountant.compose(_poisson(dp, event), count)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=4096)
def _renyi(releases: Merged, delta: float) -> float:
    if any(event.noise == 0 for event, _ in releases):
        return math.inf
    if not releases:
        return 0.0
    dp = _library()
    from dp_accounting.rdp import RdpAccountant  # pyright: ignore[reportMissingTypeStubs]

    relations = dp.NeighboringRelation
    replaced = relation_of(releases) == "replace-one"
    accountant = RdpAccountant(_ORDERS, relations.REPLACE_ONE if replaced else relations.ADD_OR_REMOVE_ONE)
    mu, sampled = _parted(releases)
    if mu:
        accountant.compose(dp.GaussianDpEvent(1 / mu))
    for event, count in sampled:
        if isinstance(event, FixedSize):
            gaussian = dp.GaussianDpEvent(event.noise / 2)
            accountant.compose(dp.SampledWithoutReplacementDpEvent(event.population, event.size, gaussian), count)
        else:
            accountant.compose(_poisson(dp, event), count)
    return float(accountant.get_epsilon(delta))


def _poisson(dp: Any, event: Event) -> Any:
    rate = event.rate if isinstance(event, Sampled) else 1.0
    return dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(event.noise))


def _library() -> Any:
    try:
        import dp_accounting  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise MissingExtra("dp-accounting", "privacy", "Accounting for differential privacy") from None
    return dp_accounting


def _between(low: float, high: float, below: float, above: float, epsilon: float) -> float:
    """Where a straight line through the logarithms of noise and cost meets just under `epsilon`, inside the bracket."""
    if not (math.isfinite(below) and above > 0):
        return math.sqrt(low * high)
    aim = math.log(epsilon * (1 - TOLERANCE / 2))
    share = (math.log(below) - aim) / (math.log(below) - math.log(above))
    return low * (high / low) ** min(max(share, 0.05), 0.95)
