"""Topology - graphs count each neighbour once, weights are what mixing needs, parts and bad sizes are refused."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.blocks.topology import (
    GRAPHS,
    Graph,
    build,
    complete,
    erdos_renyi,
    exponential,
    grid_groups,
    lambda2,
    metropolis,
    push_weights,
    random_pairs,
    ring,
    star,
    torus,
    up,
)
from fedllm.core.errors import ConfigError

SYMMETRIC = ("ring", "star", "complete", "exponential", "pairs")


@given(name=st.sampled_from(SYMMETRIC), n=st.integers(1, 20), down=st.sets(st.integers(0, 19)), seed=st.integers(0, 99))
def test_metropolis_is_symmetric_and_doubly_stochastic_on_any_alive_subgraph(
    name: str, n: int, down: set[int], seed: int
) -> None:
    graph = build(name, n, seed, round=seed).alive([i for i in range(n) if i not in down])
    weights = metropolis(graph)
    assert (weights >= 0).all() and numpy.array_equal(weights, weights.T)
    assert numpy.allclose(weights.sum(0), 1, atol=1e-15) and numpy.allclose(weights.sum(1), 1, atol=1e-15)
    assert all(weights[i, i] == 1 for i in down if i < n)
    assert all(weights[i, j] > 0 for i in range(n) for j in graph.sends[i])
    assert lambda2(weights) <= 1 + 1e-12


@given(
    name=st.sampled_from((*GRAPHS, "pairs")), n=st.integers(1, 16).filter(lambda n: n in (1, 2, 3, 4, 6, 8, 9, 12, 16))
)
def test_push_weights_have_columns_that_sum_to_one(name: str, n: int) -> None:
    graph = build(name, n, 0)
    assert numpy.allclose(push_weights(graph).sum(0), 1, atol=1e-15)
    assert all(i not in found and len(set(found)) == len(found) for i, found in enumerate(graph.sends))


@pytest.mark.parametrize(("n", "expected"), [(4, 0.333), (8, 0.805), (16, 0.949), (32, 0.987)])
def test_lambda2_of_rings(n: int, expected: float) -> None:
    assert lambda2(metropolis(ring(n))) == pytest.approx(expected, abs=6e-4)
    assert lambda2(metropolis(complete(n))) == pytest.approx(0, abs=1e-12)


def test_ring_weights_are_thirds_and_small_rings_count_each_neighbour_once() -> None:
    weights = metropolis(ring(5))
    assert numpy.allclose(weights[0], [1 / 3, 1 / 3, 0, 0, 1 / 3])
    assert ring(1).sends == ((),) and ring(2).sends == ((1,), (0,)) and ring(3).sends == complete(3).sends
    assert numpy.array_equal(metropolis(ring(2)), [[0.5, 0.5], [0.5, 0.5]])
    assert metropolis(ring(1)).tolist() == [[1.0]] and lambda2(metropolis(ring(1))) == 0.0
    assert push_weights(ring(2, directed=True)).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_complete_has_equal_weights() -> None:
    assert numpy.allclose(metropolis(complete(5)), 0.2, atol=1e-15)


def test_torus_star_exponential() -> None:
    assert all(len(found) == 4 for found in torus(9).sends) and torus(9).parts() == 1
    assert all(len(found) == 3 for found in torus(8).sends), "two rows: up and down are one neighbour"
    assert all(len(found) == 2 for found in torus(4).sends) and torus(4).parts() == 1
    assert star(4).sends == ((1, 2, 3), (0,), (0,), (0,))
    assert exponential(8, directed=True).sends[0] == (1, 2, 4) and exponential(1).sends == ((),)
    assert exponential(6).symmetric and not exponential(8, directed=True).symmetric
    assert exponential(8, directed=True).senders(0) == (4, 6, 7)


@pytest.mark.parametrize("n", [5, 7, 11])
def test_a_prime_number_of_peers_has_no_torus(n: int) -> None:
    with pytest.raises(ConfigError, match=r"prime.*method.graph=ring"):
        torus(n)


def test_metropolis_refuses_directed_edges() -> None:
    with pytest.raises(ConfigError, match=r"both directions.*push-sum"):
        metropolis(ring(4, directed=True))


def test_a_graph_in_parts_is_seen_and_refused() -> None:
    apart = Graph.of(4, [(0, 1), (2, 3)])
    assert apart.parts() == 2 and apart.parts([0, 1]) == 1 and lambda2(metropolis(apart)) == pytest.approx(1)
    assert ring(6).alive([0, 1, 3, 4]).parts([0, 1, 3, 4]) == 2
    with pytest.raises(ConfigError, match=r"parts.*edge_share"):
        build("erdos-renyi", 12, seed=0, share=0.01)
    with pytest.raises(ConfigError, match=r"no graph 'rings'.*'ring'"):
        build("rings", 4, 0)


def test_random_graphs_follow_their_seed() -> None:
    assert erdos_renyi(20, 0.3, 1) == erdos_renyi(20, 0.3, 1) != erdos_renyi(20, 0.3, 2)
    assert erdos_renyi(6, 1.0, 0).sends == complete(6).sends
    assert random_pairs(8, 0, 1) == random_pairs(8, 0, 1) != random_pairs(8, 0, 2)
    assert sorted(len(found) for found in random_pairs(7, 0, 1).sends) == [0] + [1] * 6


def test_time_varying_pairs_are_connected_over_rounds() -> None:
    product = numpy.eye(8)
    for number in range(40):
        product = metropolis(random_pairs(8, 0, number)) @ product
    assert numpy.allclose(product, 1 / 8, atol=1e-3)


@given(side=st.integers(1, 4), dims=st.integers(1, 3))
def test_groups_of_all_axes_give_the_global_mean(side: int, dims: int) -> None:
    n = side**dims
    values = numpy.random.default_rng(0).random(n)
    mean = values.mean()
    for axis in range(dims):
        groups = grid_groups(n, dims, axis)
        assert sorted(i for group in groups for i in group) == list(range(n))
        for group in groups:
            values[group] = values[group].mean()
    assert numpy.allclose(values, mean, atol=1e-12)


@given(n=st.integers(1, 40), dims=st.integers(1, 3), axis=st.integers(0, 2))
def test_groups_of_an_uneven_grid_hold_everybody_once(n: int, dims: int, axis: int) -> None:
    assert sorted(i for group in grid_groups(n, dims, axis % dims) for i in group) == list(range(n))


@given(n=st.integers(1, 30), churn=st.floats(0, 0.99), seed=st.integers(0, 5))
def test_churn_leaves_somebody(n: int, churn: float, seed: int) -> None:
    found = up(n, churn, seed, 1)
    assert 1 <= len(found) <= n and sorted(set(found)) == found and found == up(n, churn, seed, 1)


def test_renormalised_rows_move_the_mean_and_metropolis_does_not() -> None:
    alive, values = [0, 1, 2, 4, 5, 7], numpy.random.default_rng(0).random(8)
    rows = metropolis(ring(8)) * numpy.isin(numpy.arange(8), alive)
    naive = values.copy()
    naive[alive] = (rows / rows.sum(1, keepdims=True))[alive] @ values
    mixed = metropolis(ring(8).alive(alive)) @ values
    assert abs(mixed.mean() - values.mean()) < 1e-15 < 1e-4 < abs(naive.mean() - values.mean())
    assert mixed[3] == values[3] and mixed[6] == values[6]
