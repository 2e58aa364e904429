"""Topology - who talks to whom without a server, and the weights with which peers mix.

A graph says for every peer to whom it sends. Symmetric graphs get Metropolis weights, a symmetric and doubly stochastic
matrix: mixing with it keeps the mean of all peers. Directed graphs get column-stochastic shares for push-sum. Where
peers are down, weights are made on the alive subgraph; renormalising the rows of the full matrix would move the mean.

Sources: Lian et al., NeurIPS 2017, arXiv:1705.09056, section 3; Assran et al., ICML 2019, arXiv:1811.10792, section 3;
Xiao and Boyd, Systems & Control Letters 53, 2004 (Metropolis weights).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy

from fedllm.core.errors import ConfigError
from fedllm.core.seeds import numpy_stream

Matrix = numpy.ndarray
"""[n, n] in float64; entry (i, j) is the weight with which peer i takes what peer j sent."""


@dataclass(frozen=True)
class Graph:
    """Who sends to whom.

    Attributes:
        sends: for each of the n peers the peers it sends to: sorted, each once, never itself.
    """

    sends: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, n: int, edges: Iterable[tuple[int, int]], directed: bool = False) -> Graph:
        """A graph of n peers from (sender, receiver) pairs; loops and repeated pairs count for nothing."""
        sends: list[set[int]] = [set() for _ in range(n)]
        for i, j in edges:
            if i != j:
                sends[i].add(j)
                if not directed:
                    sends[j].add(i)
        return cls(tuple(tuple(sorted(found)) for found in sends))

    @property
    def n(self) -> int:
        """The number of peers."""
        return len(self.sends)

    @property
    def symmetric(self) -> bool:
        """Whether every peer hears those it sends to."""
        return all(i in self.sends[j] for i, found in enumerate(self.sends) for j in found)

    def senders(self, peer: int) -> tuple[int, ...]:
        """The peers that `peer` hears."""
        return tuple(j for j, found in enumerate(self.sends) if peer in found)

    def alive(self, up: Collection[int]) -> Graph:
        """The same peers with only the edges between peers that are `up`."""
        held = set(up)
        return Graph(
            tuple(tuple(j for j in s if j in held) if i in held else () for i, s in enumerate(self.sends))
        )  # fmt: skip

    def parts(self, up: Collection[int] | None = None) -> int:
        """How many parts the peers that are `up` (all by default) fall into, directions ignored: 1 where connected."""
        left = set(range(self.n)) if up is None else set(up)
        both = Graph.of(self.n, ((i, j) for i, found in enumerate(self.sends) for j in found))
        count = 0
        while left:
            count, front = count + 1, {left.pop()}
            while front:
                front = {j for i in front for j in both.sends[i]} & left
                left -= front
        return count


def ring(n: int, directed: bool = False) -> Graph:
    """Each peer and the next one; two peers are one edge."""
    return Graph.of(n, ((i, (i + 1) % n) for i in range(n)), directed)


def torus(n: int) -> Graph:
    """The most square grid with wrapped edges; raises :class:`ConfigError` where n has no such grid."""
    rows = max((r for r in range(1, int(n**0.5) + 1) if n % r == 0), default=1)
    if rows == 1 and n > 3:
        raise ConfigError(
            f"{n} peers cannot lie on a torus: {n} is a prime number.",
            "Allowed: a product of two numbers above 1.",
            action=f"Take {n - 1} or {n + 1} clients, or method.graph=ring.",
        )
    columns = n // rows
    across = ((i, i // columns * columns + (i + 1) % columns) for i in range(n))
    down = ((i, (i + columns) % n) for i in range(n))
    return Graph.of(n, [*across, *down])


def star(n: int) -> Graph:
    """Everybody and peer 0."""
    return Graph.of(n, ((0, i) for i in range(1, n)))


def complete(n: int) -> Graph:
    """Everybody and everybody."""
    return Graph.of(n, ((i, j) for i in range(n) for j in range(i)))


def exponential(n: int, directed: bool = False) -> Graph:
    """Each peer and those 1, 2, 4, ... hops ahead."""
    hops = [2**k for k in range(max(n - 1, 1).bit_length()) if 2**k < n]
    return Graph.of(n, ((i, (i + hop) % n) for i in range(n) for hop in hops), directed)


def erdos_renyi(n: int, share: float, seed: int) -> Graph:
    """Each pair with probability `share`, drawn by `seed`."""
    draws = numpy_stream(seed, "topology", "erdos-renyi", n).random((n, n))
    return Graph.of(n, ((i, j) for i in range(n) for j in range(i) if draws[i, j] < share))


def random_pairs(n: int, seed: int, round: int) -> Graph:
    """Disjoint pairs, drawn anew for every round; with odd n one peer is left over."""
    order = numpy_stream(seed, "topology", "pairs", round).permutation(n).tolist()
    return Graph.of(n, zip(order[::2], order[1::2], strict=False))


GRAPHS: dict[str, Callable[[int], Graph]] = {
    "ring": ring, "torus": torus, "star": star, "complete": complete, "exponential": exponential,
    "directed-ring": lambda n: ring(n, directed=True), "directed-exponential": lambda n: exponential(n, directed=True),
}  # fmt: skip
"""Graphs that depend on the number of peers alone."""


def build(name: str, n: int, seed: int, share: float = 0.5, round: int = 0) -> Graph:
    """The graph called `name`: one of `GRAPHS`, `erdos-renyi` (with `share`) or `pairs` (of `round`).

    Raises:
        ConfigError: an unknown name, or a graph that falls into parts which would never agree.
    """
    if name == "pairs":  # apart in every round, together over rounds
        return random_pairs(n, seed, round)
    if name != "erdos-renyi" and name not in GRAPHS:
        raise ConfigError.unknown("graph", name, [*GRAPHS, "erdos-renyi", "pairs"])
    graph = erdos_renyi(n, share, seed) if name == "erdos-renyi" else GRAPHS[name](n)
    if n > 1 and graph.parts() > 1:
        raise ConfigError(
            f"The graph '{name}' of {n} peers (edge share {share:g}, seed {seed}) falls into {graph.parts()} parts.",
            "Parts without an edge between them never agree.",
            action="Raise method.edge_share, or choose another graph.",
        )
    return graph


def metropolis(graph: Graph) -> Matrix:
    """W_ij = 1 / (1 + max(deg_i, deg_j)) for neighbours, the rest on the diagonal: symmetric, doubly stochastic.

    A peer without neighbours keeps what it has. Raises :class:`ConfigError` for a directed graph.
    """
    if not graph.symmetric:
        raise ConfigError("Metropolis weights need edges in both directions.", action="Use push-sum for this graph.")
    weights = numpy.zeros((graph.n, graph.n))
    for i, found in enumerate(graph.sends):
        for j in found:
            weights[i, j] = 1.0 / (1 + max(len(found), len(graph.sends[j])))
        weights[i, i] = 1.0 - weights[i].sum()
    return weights


def push_weights(graph: Graph) -> Matrix:
    """A_ij = 1 / (1 + out-degree of j) where j sends to i, and for i = j: columns sum to 1."""
    shares = numpy.zeros((graph.n, graph.n))
    for j, found in enumerate(graph.sends):
        shares[[j, *found], j] = 1.0 / (1 + len(found))
    return shares


def lambda2(weights: Matrix) -> float:
    """The second largest modulus of an eigenvalue: disagreement shrinks by it per mix; 1 where apart."""
    if len(weights) < 2:
        return 0.0
    found = numpy.linalg.eigvalsh(weights) if numpy.array_equal(weights, weights.T) else numpy.linalg.eigvals(weights)
    return float(numpy.sort(numpy.abs(found))[-2])


def grid_groups(n: int, dims: int, axis: int) -> list[list[int]]:
    """Peers on a grid of `dims` axes whose side is the least M with M^dims >= n: groups sharing all but `axis`.

    With n = M^dims and no failure, averaging inside the groups of every axis in turn gives the exact global mean
    (Ryabinin et al., NeurIPS 2021, arXiv:2103.03239, section 3.1).
    """
    side = next(m for m in range(1, n + 1) if m**dims >= n)
    groups: dict[int, list[int]] = {}
    for peer in range(n):
        groups.setdefault(peer - (peer // side**axis % side) * side**axis, []).append(peer)
    return list(groups.values())


def up(n: int, churn: float, seed: int, round: int) -> list[int]:
    """The peers that are up in a round: all but a share `churn`, drawn anew for every round; at least one."""
    order = numpy_stream(seed, "topology", "churn", round).permutation(n).tolist()
    return sorted(order[min(int(churn * n + 0.5), n - 1) :])
