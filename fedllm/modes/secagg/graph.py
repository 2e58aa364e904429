"""Graph - who exchanges masks and shares with whom, and how many shares give a secret back.

SecAgg has the complete graph. SecAgg+ has a Harary graph: the clients in a random order on a ring, each joined to k / 2
on either side. Every client holds a share of its own secrets too, so a secret has k + 1 shares.

Sources: Bonawitz et al., CCS 2017 (SecAgg), section 6 (the threshold); Bell et al., Secure Single-Server Aggregation
with (Poly)Logarithmic Overhead, CCS 2020 (SecAgg+), section 3 (the conditions on graph and threshold). The conditions
here are exact hypergeometric tails in whole numbers, not the paper's bounds, so that every machine finds the same k.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Literal

from fedllm.core.errors import ConfigError
from fedllm.modes.secagg.keys import digest, encoded

SECURITY = 40
"""A random graph fails to protect some honest client with a probability of at most 2^-40."""
FAILURE = 20
"""A round with no more than the assumed drops fails with a probability of at most 2^-20."""
MINIMUM = 3
"""No sum has fewer clients: of two, each can find the other's vector."""


@dataclass(frozen=True)
class Policy:
    """What a cohort must withstand. Every client has its own, from its own recipe, and believes no server's.

    Args:
        kind: `complete` (SecAgg) or `harary` (SecAgg+, where the cohort is large enough for it to pay).
        dropout: the share of clients that may drop during a round, 0 to below 1.
        corruption: the share of clients that may collude with the server, 0 to below 1.
        minimum: the fewest clients in a sum, at least 3.

    Raises:
        ConfigError: an argument outside these bounds.
    """

    kind: Literal["complete", "harary"] = "complete"
    dropout: float = 0.2
    corruption: float = 0.1
    minimum: int = MINIMUM

    def __post_init__(self) -> None:
        if self.kind not in ("complete", "harary"):
            raise ConfigError.unknown("graph of a secure sum", self.kind, ("complete", "harary"))
        for name, value in (("dropout", self.dropout), ("corruption", self.corruption)):
            if not 0 <= value < 1:
                raise ConfigError(f"{name}={value} of a secure sum.", "Allowed: 0 to below 1.")
        if self.minimum < MINIMUM:
            raise ConfigError(
                f"minimum={self.minimum} of a secure sum.", f"Allowed: {MINIMUM} or more.", action="Sum more clients."
            )

    def identity(self) -> bytes:
        """What both sides must have the same, in bytes."""
        shares = float(self.dropout).hex(), float(self.corruption).hex()
        return encoded("policy", self.kind, *shares, self.minimum)

    def shape(self, count: int) -> Shape:
        """The degree and the threshold for `count` clients; raises as :func:`choose`."""
        return choose(count, self.kind, self.dropout, self.corruption)


@dataclass(frozen=True)
class Shape:
    """How many neighbours a client has, and how many of its `degree` + 1 shares give a secret back."""

    degree: int
    threshold: int


@lru_cache(maxsize=256)
def choose(count: int, kind: str, dropout: float, corruption: float) -> Shape:
    """A small degree, by bisection, and for it the smallest threshold that withstand the assumed drops and corruption.

    With s = k + 1 shares of a secret and at most c corrupt holders, the threshold is the least t with 2 t > s + c: then
    a server that lies to each client differently still cannot gather t shares of both secrets of one client, because
    an honest client gives a share of one of them only. For the complete graph with n clients and a third corrupt that
    is t > 2 n / 3. The graph must moreover leave t shares of every secret after the drops, and the honest clients that
    stay must be connected by masks.

    Args:
        count: clients, at least 2.
        kind: `complete` or `harary`; a Harary graph has an even degree, and is complete where none suffices.
        dropout: the share of clients that drop, chosen without a look at the graph; at least one unless it is 0.
        corruption: the share of corrupt clients, likewise chosen; their number is rounded down.

    Raises:
        ConfigError: too few clients, or even the complete graph does not withstand so much.
    """
    if count < 2:
        raise ConfigError(f"A secure sum of {count} clients has no graph.", "Allowed: 2 or more.")
    dropped, corrupt = _dropped(dropout, count), _part(corruption, count)
    degrees = (*range(2, count - 1, 2), count - 1) if kind == "harary" else (count - 1,)
    place = bisect_left(degrees, True, key=lambda degree: _suffices(count, degree, dropped, corrupt))
    if place < len(degrees):
        return Shape(degrees[place], _threshold(count, degrees[place], corrupt))
    needed = _threshold(count, count - 1, corrupt)
    raise ConfigError(
        f"A secure sum of {count} clients cannot withstand dropout={dropout} with corruption={corruption}: "
        f"{needed} shares are needed and {count - dropped} stay.",
        "Allowed: 1 - dropout above (1 + corruption) / 2.",
        action="Lower one of them, or sum more clients.",
    )


@dataclass(frozen=True)
class Graph:
    """A cohort's graph: `order` is the ring, `degree` the neighbours of each client."""

    order: tuple[str, ...]
    degree: int

    @classmethod
    def of(cls, clients: Collection[str], degree: int, seed: bytes) -> Graph:
        """The graph of `clients` in an order that follows from `seed`, the same on every machine.

        Raises:
            ConfigError: a client twice, or a degree that is neither even and below count - 1 nor count - 1.
        """
        count = len(clients)
        if len(set(clients)) != count:
            raise ConfigError("A client is twice in the graph of a secure sum.", action="Name each client once.")
        if degree != count - 1 and (degree % 2 or not 0 < degree < count - 1):
            raise ConfigError(
                f"A graph of {count} clients with {degree} neighbours each.",
                f"Allowed: an even number below {count - 1}, or {count - 1}.",
            )
        return cls(tuple(sorted(clients, key=lambda client: digest("order", seed, client))), degree)

    def neighbours(self, client: str) -> tuple[str, ...]:
        """The clients joined to `client`, in the order of the ring, without itself."""
        count, here = len(self.order), self._places[client]
        if self.degree == count - 1:
            return self.order[here + 1 :] + self.order[:here]
        half = self.degree // 2
        return tuple(self.order[(here + step) % count] for step in (*range(-half, 0), *range(1, half + 1)))

    def holders(self, client: str) -> tuple[str, ...]:
        """Who holds a share of the client's secrets: its neighbours and itself."""
        return (*self.neighbours(client), client)

    def connected(self, alive: Collection[str]) -> bool:
        """Whether the edges between the clients of `alive` join them all; else masks would hide less than their sum."""
        if self.degree == len(self.order) - 1:
            return True
        places = sorted(self._places[client] for client in alive)
        following = [*places[1:], *(place + len(self.order) for place in places[:1])]
        return sum(b - a > self.degree // 2 for a, b in zip(places, following, strict=True)) <= 1

    @cached_property
    def _places(self) -> dict[str, int]:
        return {client: place for place, client in enumerate(self.order)}


@lru_cache(maxsize=256)
def tails(population: int, marked: int, drawn: int) -> tuple[tuple[int, ...], int]:
    """Of how many draws of `drawn` clients are at least 0, 1, ... `drawn` + 1 marked, and how many draws there are.

    The hypergeometric distribution in whole numbers: `marked` of `population` clients are marked.
    """
    low, high = max(0, drawn - (population - marked)), min(marked, drawn)
    counts = [0] * (drawn + 2)
    counts[low] = math.comb(marked, low) * math.comb(population - marked, drawn - low)
    for n in range(low, high):
        counts[n + 1] = counts[n] * (marked - n) * (drawn - n) // ((n + 1) * (population - marked - drawn + n + 1))
    return tuple(accumulate(reversed(counts)))[::-1], math.comb(population, drawn)


def points(clients: Sequence[str]) -> dict[str, int]:
    """The point at which each client holds its shares: its place in the sorted roster, from 1."""
    return {client: place for place, client in enumerate(sorted(clients), 1)}


def _part(share: float, count: int) -> int:
    """The largest number of clients that is at most `share` of them; 0.29 of 100 are 29 for all that floats say."""
    return math.floor(share * count + 1e-9)


def _dropped(share: float, count: int) -> int:
    return max(_part(share, count), int(share > 0))


def _suffices(count: int, degree: int, dropped: int, corrupt: int) -> bool:
    threshold = _threshold(count, degree, corrupt)
    connected = _connected(count, degree, min(dropped + corrupt, count))
    return threshold <= degree + 1 and connected and _survives(count, degree, threshold, dropped)


def _threshold(count: int, degree: int, corrupt: int) -> int:
    """The least t with 2 t > degree + 1 + c, where more than c corrupt neighbours of anybody are too improbable."""
    above, draws = tails(count - 1, corrupt, degree)
    worst = next(c for c in range(degree + 1) if _rare(count, above[c + 1], draws, SECURITY))
    return (degree + 1 + worst) // 2 + 1


def _survives(count: int, degree: int, threshold: int, dropped: int) -> bool:
    """Whether t shares of every client's secrets stay: its neighbours' and, unless it dropped itself, its own."""
    most = degree + 1 - threshold  # so many neighbours may drop
    here, draws = tails(count - 1, dropped, degree)
    gone, _ = tails(count - 1, max(dropped - 1, 0), degree)
    return _rare(count, here[most + 1], draws, FAILURE) and (not dropped or _rare(count, gone[most], draws, FAILURE))


def _connected(count: int, degree: int, removed: int) -> bool:
    """Whether the rest of the ring hangs together: it falls apart only where two runs of k / 2 clients are removed."""
    if degree == count - 1:
        return True
    return math.comb(count, 2) * math.comb(removed, degree) << SECURITY <= math.comb(count, degree)


def _rare(count: int, above: int, draws: int, bits: int) -> bool:
    """Whether what happens in `above` of `draws` does, to any of `count` clients, with at most 2^-bits."""
    return above * count << bits <= draws
