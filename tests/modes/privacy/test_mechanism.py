"""Clipping, drawing and noise: exact bounds, the standard deviation that arrives, and nothing that is drawn twice."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch

from fedllm.core.errors import ConfigError, UploadRejected
from fedllm.core.tensors import norm
from fedllm.modes.privacy.mechanism import (
    CHUNK,
    AdaptiveClip,
    NoiseSource,
    Tree,
    clip,
    clip_each,
    noise,
    poisson,
    release,
    summed,
)

SOURCE = NoiseSource.from_seed(7)
SHAPES = {"a": torch.empty(3, 4), "b": torch.empty(5), "c": torch.empty(())}


def drawn(seed: int, scale: float = 1.0, rows: int | None = None) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    lead = () if rows is None else (rows,)
    return {name: scale * torch.randn((*lead, *t.shape), generator=make) for name, t in SHAPES.items()}


def whole(tree: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1).double() for t in tree.values()])


def test_what_is_clipped_lies_within_the_bound_and_keeps_its_direction() -> None:
    rng = numpy.random.default_rng(0)
    for seed in range(300):
        update = drawn(seed, float(10.0 ** rng.uniform(-3, 3)))
        bound, length = float(10.0 ** rng.uniform(-2, 2)), norm(update)
        found, factor, clipped = clip(update, bound)
        assert clipped == (length > bound) and norm(found) <= bound
        assert torch.allclose(whole(found), factor * whole(update), rtol=1e-6, atol=0)
        if clipped:
            assert factor == pytest.approx(bound / length, rel=1e-6) and norm(found) > bound * (1 - 1e-6)
        else:
            assert factor == 1 and all(torch.equal(found[n], update[n]) for n in update)


def test_the_norm_is_over_all_tensors_together() -> None:
    update = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    found, factor, clipped = clip(update, 5.0)
    assert not clipped and factor == 1
    found, factor, clipped = clip(update, 1.0)
    assert clipped and factor == pytest.approx(0.2) and float(found["a"]) == pytest.approx(0.6)
    assert float(update["a"]) == 3.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrow_types_are_widened_and_huge_values_do_not_overflow(dtype: torch.dtype) -> None:
    for seed in range(50):
        found, _, _ = clip({n: t.to(dtype) for n, t in drawn(seed, 50.0).items()}, 0.1)
        assert norm(found) <= 0.1 and {t.dtype for t in found.values()} <= {torch.float32, torch.float64}
    huge, factor, clipped = clip({"a": torch.tensor([3e200, 4e200], dtype=torch.float64)}, 1.0)
    assert clipped and 0 < factor < 1e-199 and norm(huge) == pytest.approx(1, rel=1e-6)


def test_zero_and_no_bound_change_nothing() -> None:
    zero = {n: torch.zeros(t.shape) for n, t in SHAPES.items()}
    assert clip(zero, 1e-9)[1:] == (1.0, False) and not whole(clip(zero, 1.0)[0]).any()
    update = drawn(1, 1e6)
    assert clip(update, math.inf)[1:] == (1.0, False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_rejected_before_it_is_scaled(bad: float) -> None:
    update = drawn(0)
    update["b"][2] = bad
    with pytest.raises(UploadRejected, match="not finite in 'b'"):
        clip(update, 1.0)


def test_integers_and_nothing_are_rejected() -> None:
    for wrong in ({"n": torch.ones(2, dtype=torch.int64)}, {}):
        with pytest.raises(UploadRejected):
            clip(wrong, 1.0)
        with pytest.raises(UploadRejected):
            clip_each(wrong, 1.0)
        with pytest.raises(UploadRejected):
            release(wrong, 1.0, 1, SOURCE, "x")
    for bound in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="bound"):
            clip(drawn(0), bound)


def test_each_example_is_clipped_as_if_it_came_alone() -> None:
    for seed in range(20):
        stacked = drawn(seed, 2.0, rows=6)
        stacked["a"][3] = 0.01 * stacked["a"][3]
        stacked = {n: torch.cat([t, torch.zeros_like(t[:1]), 1e-3 * t[:1]]) for n, t in stacked.items()}
        found = clip_each(stacked, 1.5)
        singles = [clip({n: t[b] for n, t in stacked.items()}, 1.5) for b in range(8)]
        assert torch.allclose(whole(found.total), whole(summed([s[0] for s in singles], SHAPES)), atol=1e-6)
        assert found.clipped == sum(s[2] for s in singles) and found.dropped == 0
        lengths = [norm({n: t[b] for n, t in stacked.items()}) for b in range(8)]
        assert found.norms.tolist() == pytest.approx(lengths)
        assert {n: t.shape for n, t in found.total.items()} == {n: t.shape for n, t in SHAPES.items()}


def test_one_example_moves_the_sum_by_at_most_the_bound() -> None:
    for seed in range(50):
        stacked = drawn(seed, 10.0 ** (seed % 5), rows=5)
        with_all = clip_each(stacked, 0.7).total
        without = clip_each({n: t[:-1] for n, t in stacked.items()}, 0.7).total
        assert float((whole(with_all) - whole(without)).norm()) <= 0.7 + 1e-12


def test_an_example_that_is_not_finite_is_left_out_and_no_example_is_a_sum_of_zero() -> None:
    stacked = drawn(0, rows=4)
    wanted = clip_each({n: t[[0, 2]] for n, t in stacked.items()}, 1.0)
    stacked["a"][1, 0, 0], stacked["b"][3, 1] = math.nan, math.inf
    found = clip_each(stacked, 1.0)
    assert found.dropped == 2 and torch.allclose(whole(found.total), whole(wanted.total))
    assert torch.isinf(found.norms[[1, 3]]).all() and torch.isfinite(found.norms[[0, 2]]).all()
    empty = clip_each({n: t[:0] for n, t in stacked.items()}, 1.0)
    assert not whole(empty.total).any() and len(empty.norms) == 0
    with pytest.raises(UploadRejected, match="first axes"):
        clip_each({**stacked, "c": torch.zeros(3)}, 1.0)


def moments(values: torch.Tensor) -> None:
    """Mean, variance, skewness, kurtosis and tails of standard normal numbers, within four standard errors."""
    n = len(values)
    assert abs(float(values.mean())) < 4 / math.sqrt(n)
    assert abs(float(values.square().mean()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float(values.pow(3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float(values.pow(4).mean()) - 3) < 4 * math.sqrt(96 / n)
    for edge, share in ((1.0, 0.317311), (2.0, 0.045500), (3.0, 0.0026998)):
        assert abs(float((values.abs() > edge).double().mean()) - share) < 4 * math.sqrt(share / n)


def test_the_numbers_are_standard_normal() -> None:
    values = SOURCE.normal(400_000, "test")
    moments(values)
    assert values.dtype == torch.float64 and len(values.unique()) == len(values)
    lagged = (values[1:] * values[:-1]).mean()
    assert abs(float(lagged)) < 4 / math.sqrt(len(values))
    cells = torch.bincount((torch.special.ndtr(values) * 100).long(), minlength=100).double()
    chi = float(((cells - 4000) ** 2 / 4000).sum())
    assert 50 < chi < 165  # 99 degrees of freedom: five standard deviations


def test_noise_is_a_function_of_the_key_and_its_names_alone() -> None:
    like = {"a": torch.empty(CHUNK + 5), "b": torch.empty(7)}
    first = noise(like, 2.0, SOURCE, "round", 3)
    again = noise(dict(reversed(like.items())), 2.0, NoiseSource.from_seed(7), "round", 3)
    assert all(torch.equal(first[n], again[n]) for n in like)
    longer = noise({"a": torch.empty(3 * CHUNK)}, 2.0, SOURCE, "round", 3)["a"]
    assert torch.equal(longer[: CHUNK // 2], first["a"][: CHUNK // 2])
    others = [
        noise(like, 2.0, SOURCE, "round", 4),
        noise(like, 2.0, SOURCE, "round", "3"),
        noise(like, 2.0, NoiseSource.from_seed(8), "round", 3),
        noise(like, 2.0, NoiseSource.secret(), "round", 3),
    ]
    for other in others:
        assert abs(float(numpy.corrcoef(first["a"], other["a"])[0, 1])) < 5 / math.sqrt(CHUNK)
    assert abs(float(numpy.corrcoef(first["a"][:CHUNK], longer[CHUNK : 2 * CHUNK])[0, 1])) < 5 / math.sqrt(CHUNK)
    assert NoiseSource.secret().key != NoiseSource.secret().key
    with pytest.raises(ConfigError, match="3 bytes"):
        NoiseSource(b"abc")
    with pytest.raises(ConfigError, match="standard deviation"):
        noise(like, -1.0, SOURCE, "x")


def test_the_noise_that_arrives_has_the_stated_deviation() -> None:
    """z = 1, S = 1, 50 expected, zero updates: the mean has a standard deviation of 1/50."""
    zero = {"a": torch.zeros(200, 200), "b": torch.zeros(10_000)}
    for expected in (50, 10):
        found = release(zero, 1.0, expected, SOURCE, "round", expected)
        assert found["a"].dtype == torch.float32
        moments(whole(found) * expected)
        for part in found.values():
            wanted = 1 / expected
            assert float(part.double().std()) == pytest.approx(wanted, rel=4 / math.sqrt(2 * part.numel()))


def test_the_denominator_is_the_expected_number_and_not_who_came() -> None:
    updates = [clip(drawn(seed), 1.0)[0] for seed in range(3)]
    for came in range(4):
        total = summed(updates[:came], SHAPES)
        found = release(total, 0.0, 2.5, SOURCE, "x")
        assert torch.allclose(whole(found), whole(total) / 2.5, atol=1e-7)
    assert norm(release(summed([], SHAPES), 1.0, 2.5, SOURCE, "x")) > 0
    for wrong in (0, -1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="expected"):
            release(summed([], SHAPES), 1.0, wrong, SOURCE, "x")
    with pytest.raises(UploadRejected, match="not finite"):
        release({"a": torch.tensor([math.nan])}, 1.0, 1, SOURCE, "x")
    with pytest.raises(UploadRejected, match="missing"):
        summed([{"a": torch.zeros(3, 4)}], SHAPES)


def test_a_sum_does_not_lose_small_updates() -> None:
    like = {"a": torch.zeros(1)}
    updates = [
        {"a": torch.tensor([1e8])},
        *({"a": torch.tensor([0.25])} for _ in range(400)),
        {"a": torch.tensor([-1e8])},
    ]
    assert float(summed(updates, like)["a"]) == 100.0


def test_without_noise_and_bound_the_release_is_the_plain_mean() -> None:
    updates = [drawn(seed) for seed in range(4)]
    total = summed([clip(update, math.inf)[0] for update in updates], SHAPES)
    wanted = torch.stack([whole(update) for update in updates]).mean(0)
    assert torch.allclose(whole(release(total, 0.0, 4, SOURCE, "x")), wanted, atol=1e-7)


def test_poisson_samples_are_coins_of_each() -> None:
    clients = [f"c{number:03}" for number in range(200)]
    rounds = [poisson(clients, 0.1, SOURCE.stream("round", number)) for number in range(400)]
    sizes = numpy.array([len(cohort) for cohort in rounds])
    assert abs(sizes.mean() - 20) < 4 * math.sqrt(18 / 400)
    assert abs(sizes.var() / 18 - 1) < 4 * math.sqrt(2 / 400)  # a fixed size would have none
    joined = numpy.array([[c in set(cohort) for c in clients] for cohort in rounds], dtype=float)
    assert numpy.abs(joined.mean(0) - 0.1).max() < 5 * math.sqrt(0.09 / 400)
    pairs = numpy.corrcoef(joined.T)[numpy.triu_indices(200, 1)]
    assert abs(pairs.mean()) < 4 / math.sqrt(400 * len(pairs))
    shuffled = poisson(reversed(clients), 0.1, SOURCE.stream("round", 0))
    assert shuffled == rounds[0] and poisson(clients, 0.1, SOURCE.stream("round", 1)) != rounds[0]
    rng = numpy.random.default_rng(0)
    assert poisson(range(5), 1.0, rng) == [0, 1, 2, 3, 4] and poisson(range(5), 0.0, rng) == poisson([], 0.5, rng) == []
    with pytest.raises(ConfigError, match="twice"):
        poisson(["a", "b", "a"], 0.5, rng)
    with pytest.raises(ConfigError, match="rate"):
        poisson(["a"], 1.5, rng)


@pytest.mark.parametrize("start", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("std", [0.0, None])
def test_an_adaptive_bound_finds_the_median(start: float, std: float | None) -> None:
    rng = numpy.random.default_rng(3)
    rule, bound, late = AdaptiveClip(100, noise=std), start, []
    for round in range(80):
        lengths = numpy.exp(0.3 * rng.standard_normal(rng.binomial(1000, 0.1)))  # median 1; who comes is random
        total = sum(rule.bit(float(length), bound) for length in lengths)
        bound = rule.step(bound, total, SOURCE, "round", round)
        late.append(bound)
    assert numpy.mean(late[-20:]) == pytest.approx(1, abs=0.08)
    assert 0.8 < late[39] < 1.25


def test_an_adaptive_bound_follows_other_quantiles_and_the_published_step() -> None:
    exact = AdaptiveClip(4, quantile=0.5, rate=0.2, noise=0.0)
    assert exact.step(2.0, 0.5 * (3 - 1), SOURCE, "x") == pytest.approx(2 * math.exp(-0.2 * (0.75 - 0.5)))
    assert exact.step(2.0, 0.5 * 4, SOURCE, "x") < 2 < exact.step(2.0, -0.5 * 4, SOURCE, "x")
    assert exact.step(2.0, 0.0, SOURCE, "nobody came") == 2.0
    assert (exact.bit(1.0, 1.0), exact.bit(1.1, 1.0)) == (0.5, -0.5)
    rng, bound = numpy.random.default_rng(0), 1.0
    for _ in range(200):
        lengths = rng.uniform(0, 1, 500)
        rule = AdaptiveClip(500, quantile=0.8, noise=0.0)
        bound = rule.step(bound, sum(rule.bit(float(x), bound) for x in lengths), SOURCE, "x")
    assert bound == pytest.approx(0.8, abs=0.03)


def test_the_noise_on_the_count_has_its_deviation_and_the_bound_has_ends() -> None:
    rule = AdaptiveClip(40, rate=1.0)
    assert rule.std == 2.0
    steps = torch.tensor([-40 * math.log(rule.step(1.0, 0.0, SOURCE, "n", k)) for k in range(4000)])
    moments(steps.double() / 2)
    ended = AdaptiveClip(1, noise=0.0, rate=1.0, least=0.5, most=2.0)
    assert ended.step(0.5, 0.5, SOURCE, "x") == 0.5 and ended.step(2.0, -0.5, SOURCE, "x") == 2.0
    wrong: list[dict[str, Any]] = [{"expected": 0}, {"rate": 0}, {"noise": -1}, {"quantile": 1.0}, {"least": 0}]
    for options in wrong:
        with pytest.raises(ConfigError, match="adaptive"):
            AdaptiveClip(**{"expected": 10, **options})


LIKE = {"a": torch.empty(20_000)}


def variance(tree: Tree, step: int) -> float:
    return float(tree.cumulative(step)["a"].square().mean())


def test_the_noise_of_a_sum_has_one_node_per_set_bit() -> None:
    tree = Tree(LIKE, 1.0, SOURCE, "ftrl")
    for step in (0, 1, 2, 3, 7, 8, 11, 255, 256):
        assert variance(tree, step) == pytest.approx(step.bit_count(), rel=0.06)
    doubled = Tree(LIKE, 2.0, SOURCE, "ftrl")
    assert torch.allclose(doubled.cumulative(11)["a"], 2 * tree.cumulative(11)["a"])


def test_sums_share_the_nodes_that_the_tree_says() -> None:
    tree = Tree(LIKE, 1.0, SOURCE, "ftrl")
    noises = {t: tree.cumulative(t)["a"] for t in range(17)}

    def prefix(step: int) -> set[tuple[int, int]]:
        nodes, start = set(), 0
        for height in reversed(range(6)):
            if step >> height & 1:
                nodes.add((height, start >> height))
                start += 1 << height
        return nodes

    for left in range(1, 17):
        for right in range(left, 17):
            shared = len(prefix(left) & prefix(right))
            assert float((noises[left] * noises[right]).mean()) == pytest.approx(shared, abs=0.09)


@pytest.mark.parametrize(("complete", "kept"), [(False, 2), (True, 1)])
def test_a_restart_keeps_the_noise_that_was_released(complete: bool, kept: int) -> None:
    tree = Tree(LIKE, 1.0, SOURCE, "ftrl", restart=6, complete=complete)
    assert tree.leaves == (8 if complete else 6)
    ends = {k: tree.cumulative(6 * k)["a"] for k in range(4)}
    for k, end in ends.items():
        assert float(end.square().mean()) == pytest.approx(kept * k, rel=0.06)
    for k in (1, 2):
        for inside in (1, 2, 3, 5):
            rest = tree.cumulative(6 * k + inside)["a"] - ends[k]
            assert float(rest.square().mean()) == pytest.approx(inside.bit_count(), rel=0.06)
            assert abs(float((rest * ends[k]).mean())) < 0.06
    again = Tree(LIKE, 1.0, SOURCE, "ftrl", restart=6, complete=complete)  # resumed: nothing but the step is needed
    assert torch.equal(again.cumulative(17)["a"], tree.cumulative(17)["a"])
    assert torch.equal(tree.cumulative(3)["a"], again.cumulative(3)["a"])  # and back


def test_trees_refuse_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="restarts"):
        Tree(LIKE, 1.0, SOURCE, "x", restart=0)
    with pytest.raises(ConfigError, match="-1 steps"):
        Tree(LIKE, 1.0, SOURCE, "x").cumulative(-1)
    assert Tree(LIKE, 1.0, SOURCE, "x").leaves is None
    assert [Tree(LIKE, 1.0, SOURCE, "x", restart=n).leaves for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
