"""Evolution - rebuilt from tensors it is the living object to the bit; ranks, weights, few replies, hostile ones."""

from __future__ import annotations

import asyncio
import builtins
import math
from typing import Any

import numpy
import pytest
import torch

from fedllm.blocks.evolution import (
    Evolution,
    first_state,
    over_clients,
    positive_weights,
    ranked,
    searched,
    vectors,
)
from fedllm.blocks.subspace import Subspace, projection, ratio, scrambled
from fedllm.core.errors import ConfigError, DataError, MissingExtra, ModelError
from fedllm.core.message import Dense, Message
from fedllm.core.wire import decode, encode

cma: Any = pytest.importorskip("cma", reason="needs the extra 'blackbox'")


def bowl(z: torch.Tensor) -> float:
    return float(((z - 1).square() * torch.arange(1, len(z) + 1)).sum())


@pytest.mark.parametrize(("size", "count", "parents"), [(6, 4, 4), (16, 10, None), (3, 5, 5), (40, 3, 3)])
def test_rebuilt_in_every_step_it_is_the_living_object_to_the_bit(size: int, count: int, parents: int | None) -> None:
    """30 steps of cma's own object, and 30 of one that goes through bytes between any two steps."""
    one, two = numpy.random.default_rng(5), numpy.random.default_rng(5)
    options = {
        "popsize": count, "CMA_mu": parents, "randn": lambda *shape: one.standard_normal(shape), "seed": math.nan,
        "verbose": -9, "verb_log": 0, "updatecovwait": 0, "CMA_mirrors": 0,
        "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,
    }  # fmt: skip
    live = cma.CMAEvolutionStrategy(numpy.zeros(size), 0.7, options)
    live.sm.C = numpy.eye(size)
    live.sm.update_now(-1)
    live._updateBDfromSM(live.sm)
    state = first_state(size, 0.7)
    for _ in range(30):
        tried = live.ask()
        live.tell(tried, [bowl(torch.tensor(z)) for z in tried])
        strategy = Evolution(state, count, two, parents)
        asked = strategy.ask()
        strategy.tell(asked, [bowl(z) for z in asked])
        message = decode(encode(Message({"search": Dense(strategy.state())})))
        state = message["search"]
    assert torch.equal(state["mean"], torch.from_numpy(live.mean))
    assert torch.equal(state["C"], torch.from_numpy(live.sm.C)) and float(state["sigma"]) == live.sigma
    assert torch.equal(state["pc"], torch.from_numpy(live.pc)) and float(state["count"]) == 30
    assert torch.equal(state["ps"], torch.from_numpy(live.adapt_sigma.ps))
    assert parents or bowl(state["mean"]) < bowl(torch.zeros(size)) / 2


def test_it_draws_from_the_given_stream_alone() -> None:
    numpy.random.seed(1)
    before = numpy.random.get_state()[1].copy()  # type: ignore[index]
    first = [Evolution(first_state(4, 1.0), 5, numpy.random.default_rng(3)).ask() for _ in range(2)]
    assert (numpy.random.get_state()[1] == before).all()  # type: ignore[index]
    assert all(torch.equal(a, b) for a, b in zip(*first, strict=True))
    other = Evolution(first_state(4, 1.0), 5, numpy.random.default_rng(4)).ask()
    assert not torch.equal(first[0][0], other[0])


def test_only_ranks_count_and_what_is_no_number_is_last() -> None:
    assert ranked([3.0, math.nan, 1.0, math.inf, 1.0, -math.inf]) == [1.0, 2.0, 0.0, 2.0, 0.0, -1.0]
    assert ranked([math.nan, math.nan]) == [0.0, 0.0]
    for fitness in ([1.0, 2.0, math.nan, 4.0], [10.0, 1e8, math.nan, 1e300]):
        strategy = Evolution(first_state(3, 1.0), 4, numpy.random.default_rng(0))
        strategy.tell(strategy.ask(), fitness)
        moved = strategy.mean
        again = Evolution(first_state(3, 1.0), 4, numpy.random.default_rng(0))
        again.tell(again.ask(), [0.0, 1.0, 3.0, 2.0])
        assert torch.equal(moved, again.mean)


def test_too_few_solutions_and_a_damaged_state() -> None:
    with pytest.raises(ConfigError, match="2 solutions are too few"):
        Evolution(first_state(3, 1.0), 2, numpy.random.default_rng(0))
    with pytest.raises(ConfigError, match="not positive definite"):
        Evolution(first_state(3, 1.0) | {"C": -torch.eye(3)}, 4, numpy.random.default_rng(0))


def test_without_the_package_the_error_names_the_extra(monkeypatch: Any) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "cma":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtra, match=r"fedllm\[blackbox\]"):
        Evolution(first_state(3, 1.0), 4, numpy.random.default_rng(0))


def test_a_search_measures_candidates_and_its_end() -> None:
    seen = []

    async def measured(z: torch.Tensor) -> tuple[float, float]:
        seen.append(z)
        return bowl(z), 7.0

    strategy = Evolution(first_state(4, 0.5), 6, numpy.random.default_rng(0))
    sigmas, fitness, loss = asyncio.run(searched(strategy, 5, measured))
    assert len(seen) == 5 * 6 + 1 and len(sigmas) == 5 and sigmas[-1] == strategy.sigma
    assert torch.equal(seen[-1], strategy.mean) and (fitness, loss) == (bowl(strategy.mean), 7.0)

    async def nothing(z: torch.Tensor) -> tuple[float, float]:
        return math.nan, math.nan

    with pytest.raises(ModelError, match="a loss that is a number"):
        asyncio.run(searched(Evolution(first_state(4, 0.5), 6, numpy.random.default_rng(0)), 1, nothing))


# --- the server's step -----------------------------------------------------------------------------------------------


def reply(z: list[float], fitness: float, sigmas: tuple[float, ...] = (0.9, 0.8), parents: float = 2.0) -> Any:
    return vectors(z=z, fitness=[fitness], sigmas=sigmas, parents=[parents])


def begin(size: int = 3) -> Any:
    return first_state(size, 1.0) | vectors(local=[1.0])


def step(search: Any, replies: list[Any], least: float = 0.5) -> Any:
    return over_clients(search, replies, least, numpy.random.default_rng(0))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_the_mean_is_a_sum_with_positive_weights_and_the_best_is_heaviest(count: int) -> None:
    weights = positive_weights(count)
    assert sum(weights) == pytest.approx(1, abs=1e-12) and min(weights) > 0 and weights == sorted(weights)[::-1]
    draw = numpy.random.default_rng(count)
    replies = [reply((draw.normal(size=3) * 0.3).tolist(), f) for f in draw.permutation(count).astype(float)]
    order = sorted(range(count), key=lambda i: float(replies[i]["fitness"]))
    expected = sum(w * replies[i]["z"] for w, i in zip(weights, order, strict=True))
    found = step(begin(), replies)
    assert torch.allclose(found["mean"], expected, atol=1e-12)


def test_step_sizes_are_pooled_and_the_clients_never_grow() -> None:
    """sigma_G = sqrt(sum of squares / (m mu)): three clients, two iterations each of 0.9 and 0.8, two parents."""
    replies = [reply([0.1 * k, 0, 0], float(k)) for k in range(3)]
    pooled = math.sqrt(3 * (0.9**2 + 0.8**2) / (3 * 2))
    strategy = Evolution(first_state(3, 1.0), 3, numpy.random.default_rng(0), 3)
    strategy.tell([r["z"] for r in replies], [0.0, 1.0, 2.0], pooled)
    found = step(begin(), replies)
    assert float(found["sigma"]) == strategy.sigma
    assert float(found["local"]) == pytest.approx(min(1.0, max(0.5, strategy.sigma / pooled)))
    grown = step(begin(), [reply([9.0 * k, 9.0, 9.0], float(k)) for k in range(3)])
    assert float(grown["local"]) == 1.0 and float(grown["sigma"]) > pooled
    low = step(begin() | vectors(local=[0.5]), [reply([0, 0, 0], float(k)) for k in range(3)])
    assert float(low["local"]) == 0.5


def test_few_replies_move_the_mean_and_nothing_else() -> None:
    search = begin()
    one = step(search, [reply([1, 2, 3], 5.0)])
    assert one["mean"].tolist() == [1, 2, 3]
    two = step(search, [reply([1, 0, 0], 5.0), reply([0, 1, 0], 1.0)])
    assert two["mean"][1] > two["mean"][0] > 0 and float(two["mean"].sum()) == pytest.approx(1)
    for found in (one, two):
        assert all(torch.equal(found[n], search[n]) for n in search if n != "mean")


def test_the_number_of_replies_may_change_from_round_to_round() -> None:
    search = begin()
    for count in (3, 5, 2, 4, 1, 3):
        draw = numpy.random.default_rng(count)
        search = step(search, [reply(draw.normal(size=3).tolist(), float(k)) for k in range(count)])
    assert all(bool(torch.isfinite(t).all()) for t in search.values()) and float(search["count"]) == 4


HOSTILE = [
    reply([1e300] * 3, 0.0),
    reply([0, 0, 0], -1e300),
    reply([0, 0, 0], 0.0, (1e300, 1e300)),
    reply([0, 0, 0], 0.0, (0.0, 0.0), 0.0),
    reply([0, 0, 0], 0.0, (-1.0, 2.0), -9.0),
]


@pytest.mark.parametrize("bad", HOSTILE)
def test_a_hostile_reply_cannot_break_the_run(bad: Any) -> None:
    search = begin()
    for _ in range(3):
        search = step(search, [bad, reply([0.1, 0, 0], 1.0), reply([0, 0.1, 0], 2.0)])
    assert all(bool(torch.isfinite(t).all()) for t in search.values())
    assert float(search["mean"].norm()) < 1e3 and 0 < float(search["sigma"]) < 1e3


# --- the subspace ----------------------------------------------------------------------------------------------------


def test_two_clients_build_the_same_projection_from_the_seed() -> None:
    first = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    z = torch.arange(5).double()
    one = Subspace(size=5).prompt(z, first)
    projection.cache_clear()
    assert torch.equal(one, Subspace(size=5).prompt(z, first.clone()))
    assert not torch.equal(one, Subspace(size=5, seed=1).prompt(z, first))
    assert torch.equal(Subspace(size=5).prompt(torch.zeros(5), first), first), "the search begins at the first prompt"


def test_the_scale_is_that_of_the_first_prompt() -> None:
    first = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 0.3
    z = torch.randn(100, generator=torch.Generator().manual_seed(1)).double() * 2
    moved = Subspace(size=100, sigma=2.0).prompt(z, first) - first
    assert float(moved.std()) == pytest.approx(0.3, rel=0.15)
    assert torch.allclose(Subspace(size=100, alpha=3.0, sigma=2.0).prompt(z, first) - first, 3 * moved, atol=1e-5)
    with pytest.raises(ConfigError, match="the same number everywhere"):
        Subspace(size=100).prompt(z, torch.zeros(2, 2))
    assert float(Subspace(size=100, spread=1.0).prompt(z, torch.zeros(50, 64)).std()) > 1


def test_no_graph_is_made() -> None:
    assert not Subspace(size=3).prompt(torch.ones(3), torch.randn(2, 2, requires_grad=True)).requires_grad


def test_scrambled_texts_keep_labels_and_lengths() -> None:
    rows = [{"text": f"alpha{i} beta gamma delta", "label": f"l{i}"} for i in range(40)]
    found = scrambled(rows, 0.5, numpy.random.default_rng(0))
    assert [r["label"] for r in found] == [r["label"] for r in rows]
    words = [(x["text"].split(), y["text"].split()) for x, y in zip(rows, found, strict=True)]
    pairs = [pair for before, after in words for pair in zip(before, after, strict=True)]
    same = sum(a == b for a, b in pairs) / len(pairs)
    assert 0.5 < same < 0.75, "half are drawn anew, some of them the same"
    assert scrambled(rows, 1.0, numpy.random.default_rng(0)) != rows
    assert scrambled(rows, 0.5, numpy.random.default_rng(0)) == found
    tokens = scrambled([{"tokens": ["a", "b"], "tags": ["X", "Y"]}], 1.0, numpy.random.default_rng(0))
    assert len(tokens[0]["tokens"]) == 2 and tokens[0]["tags"] == ["X", "Y"]
    both = scrambled([{"instruction": "one two", "response": "three four"}], 1.0, numpy.random.default_rng(1))
    assert both[0]["response"] == "three four" and set(both[0]["instruction"].split()) <= {"one", "two"}


@pytest.mark.parametrize("row", [{"text": "only text"}, {"label": "a"}, {"x": [1.0]}, {"messages": []}])
def test_rows_that_cannot_be_scrambled(row: Any) -> None:
    with pytest.raises(DataError, match="cannot be scrambled"):
        scrambled([row], 0.5, numpy.random.default_rng(0))


def test_the_ratio_is_floored_and_hides_no_missing_loss() -> None:
    assert ratio(2.0, 4.0, 0.1) == 0.5 and ratio(2.0, 0.0, 0.1) == 20.0
    for loss, other in ((None, 1.0), (1.0, None), (math.nan, 1.0), (1.0, math.nan)):
        assert math.isnan(ratio(loss, other, 0.1))
