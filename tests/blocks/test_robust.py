"""Robust rules: brute-force references, what no order or attacker may change, and what is refused."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy
import pytest
import torch

from fedllm.blocks import anomaly, malice, robust
from fedllm.blocks.anomaly import (
    crfl,
    cross_round,
    foolsgold,
    outlier_detection,
    residual_reweighting,
    smoothing_radius,
    soteria,
    three_sigma,
    wbc,
    weak_dp,
)
from fedllm.blocks.robust import (
    Verdict,
    bulyan,
    cclip,
    coordinate_median,
    geometric_median,
    krum,
    mean,
    multi_krum,
    norm_clip,
    robust_learning_rate,
    slsgd,
    trimmed_mean,
)
from fedllm.core.errors import ConfigError, UploadRejected

SEEDS = range(20)
K, D, F = 11, 7, 2
Rule = Callable[..., Verdict]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(seed: int, k: int = K, d: int = D) -> torch.Tensor:
    """Clients that agree on a direction and differ around it."""
    return torch.randn(k, d, generator=rng(seed), dtype=torch.float64) + torch.linspace(1, 2, d, dtype=torch.float64)


def ones(k: int = K) -> torch.Tensor:
    return torch.ones(k)


def names(k: int) -> list[str]:
    return [f"c{i:02d}" for i in range(k)]


def with_ids(rule: Rule, **options: Any) -> Rule:
    def call(rows: torch.Tensor, weights: torch.Tensor, ids: list[str] | None = None) -> Verdict:
        return rule(rows, weights, clients=ids or names(len(rows)), **options)

    return call


def plain(rule: Rule, **options: Any) -> Rule:
    return lambda rows, weights, ids=None: rule(rows, weights, **options)


def modelled(rule: Rule, **options: Any) -> Rule:
    def call(rows: torch.Tensor, weights: torch.Tensor, ids: list[str] | None = None) -> Verdict:
        model = torch.linspace(3, 4, rows.shape[-1], dtype=rows.dtype)
        return rule(rows, weights, clients=ids or names(len(rows)), model=model, **options)

    return call


RULES: dict[str, Rule] = {
    "mean": plain(mean),
    "norm_clip": plain(norm_clip, bound=3.0),
    "cclip": plain(cclip, tau=3.0, f=F),
    "cclip_steps": plain(cclip, tau=3.0, f=F, steps=3),
    "slsgd_1": plain(slsgd, alpha=0.5),
    "slsgd_2": plain(slsgd, alpha=0.5, option=2, b=F, f=F),
    "robust_learning_rate": plain(robust_learning_rate, theta=5, f=F),
    "krum": plain(krum, f=F),
    "multi_krum": plain(multi_krum, f=F, m=5),
    "bulyan": plain(bulyan, f=F),
    "coordinate_median": plain(coordinate_median, f=F),
    "trimmed_mean": plain(trimmed_mean, beta=0.2, f=F),
    "geometric_median": plain(geometric_median, f=F),
    "foolsgold": with_ids(foolsgold),
    "three_sigma_krum": plain(three_sigma, score="krum", f=F),
    "three_sigma_median": plain(three_sigma, score="median", f=F),
    "three_sigma_foolsgold": with_ids(three_sigma, score="foolsgold", f=F),
    "cross_round": modelled(cross_round),
    "outlier_detection": modelled(outlier_detection, f=F),
    "residual_reweighting": plain(residual_reweighting, f=F),
}
ALIKE_IS_ODD = {"foolsgold", "three_sigma_foolsgold"}
"""Rules that take equal clients for sybils."""
NEEDS_OTHERS = {"krum", "multi_krum", "bulyan", "residual_reweighting", "three_sigma_krum", "outlier_detection"}
"""Rules that assume at least three clients."""


# -- what holds for every rule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_clients_does_not_show(name: str) -> None:
    for seed in SEEDS:
        rows, weights = drawn(seed), torch.rand(K, generator=rng(seed)) + 0.5
        if seed % 2:
            rows[F] = rows[F - 1]  # ties, too, go by content
        order = torch.randperm(K, generator=rng(seed + 1))
        first = RULES[name](rows, weights)
        second = RULES[name](rows[order], weights[order], [names(K)[i] for i in order])
        assert torch.allclose(first.update, second.update, atol=1e-9), seed
        if name != "residual_reweighting" and not (name in ("krum", "multi_krum", "bulyan") and seed % 2):
            assert torch.allclose(first.kept.double()[order], second.kept.double(), atol=1e-9), seed


@pytest.mark.parametrize("name", RULES)
def test_same_input_same_bits_and_nothing_given_is_changed(name: str) -> None:
    rows, weights = drawn(0), torch.rand(K, generator=rng(0)) + 0.5
    before = rows.clone(), weights.clone()
    first, second = RULES[name](rows, weights), RULES[name](rows, weights)
    assert torch.equal(first.update, second.update) and torch.equal(first.kept, second.kept)
    assert torch.equal(rows, before[0]) and torch.equal(weights, before[1])
    assert first.kept.shape == (K,) and bool(((first.kept.double() >= 0) & (first.kept.double() <= 1)).all())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_stays_and_columns_do_not_meet(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = drawn(1, d=23).to(dtype)
    whole = RULES[name](rows, ones())
    monkeypatch.setattr(robust, "COLUMNS_AT_ONCE", 11)  # 11, 11 and a last one alone
    parts = RULES[name](rows, ones())
    assert whole.update.dtype == dtype and whole.update.shape == (23,)
    assert torch.allclose(whole.update, parts.update, atol=1e-6)
    assert torch.allclose(whole.kept.double(), parts.kept.double(), atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_clients_that_agree_are_all_kept_alike(name: str) -> None:
    rows = drawn(2)[:1].repeat(K, 1) / 3
    found = RULES[name](rows, ones())
    if name in ALIKE_IS_ODD and name == "foolsgold":
        assert not found.kept.any() and not found.update.any() and "No client" in found.note
        return
    half = 0.5 if name.startswith("slsgd") else 1.0
    assert torch.allclose(found.update, half * rows[0], atol=1e-12)
    if name not in ("krum", "multi_krum", "bulyan"):
        assert bool((found.kept.double() == 1).all())


@pytest.mark.parametrize("name", RULES)
def test_one_client_is_taken_as_it_is_or_too_few(name: str) -> None:
    assumed = {"f": 0, **({"tau": 1e3} if name.startswith("cclip") else {})}
    one: dict[str, Rule] = {
        "norm_clip": plain(norm_clip, bound=1e3),
        "cclip": plain(cclip, **assumed),
        "cclip_steps": plain(cclip, steps=3, **assumed),
        "slsgd_2": plain(slsgd, alpha=0.5, option=2),
        "robust_learning_rate": plain(robust_learning_rate, theta=1),
        "krum": plain(krum, f=0),
        "multi_krum": plain(multi_krum, f=0, m=1),
        "bulyan": plain(bulyan, f=0),
        "coordinate_median": plain(coordinate_median),
        "trimmed_mean": plain(trimmed_mean, beta=0.4),
        "geometric_median": plain(geometric_median),
        "three_sigma_krum": plain(three_sigma, score="krum"),
        "three_sigma_median": plain(three_sigma, score="median"),
        "three_sigma_foolsgold": with_ids(three_sigma, score="foolsgold"),
        "outlier_detection": modelled(outlier_detection, f=0),
        "residual_reweighting": plain(residual_reweighting),
    }
    rule, rows = one.get(name, RULES[name]), drawn(3, k=1)
    if name in NEEDS_OTHERS:
        with pytest.raises(ConfigError, match=r"K=1 clients.*= 3"):
            rule(rows, ones(1))
        return
    found = rule(rows, torch.tensor([5.0]))
    assert torch.allclose(found.update, rows[0] * (0.5 if name.startswith("slsgd") else 1.0), atol=1e-12)
    assert found.kept.tolist() == [1]


@pytest.mark.parametrize("name", RULES)
def test_what_is_not_finite_or_no_matrix_is_refused(name: str) -> None:
    for value in (math.nan, math.inf, -math.inf, 1e101):
        rows = drawn(4)
        rows[6, 3] = value
        with pytest.raises(UploadRejected, match="row 6"):
            RULES[name](rows, ones())
    for bad in (-1.0, math.nan, math.inf):
        weights = ones()
        weights[2] = bad
        with pytest.raises(UploadRejected, match="weights"):
            RULES[name](drawn(4), weights)
    with pytest.raises(UploadRejected, match="not all zero"):
        RULES[name](drawn(4), torch.zeros(K))
    with pytest.raises(ConfigError, match="One weight per client"):
        RULES[name](drawn(4), ones(K - 1))
    for rows in (torch.zeros(0, D), torch.zeros(K, 0), torch.zeros(D), torch.ones(K, D, dtype=torch.int64)):
        with pytest.raises(ConfigError, match=r"Allowed: \[K, D\]"):
            RULES[name](rows, ones(len(rows)))
    with pytest.raises(ConfigError, match="float32 or float64"):
        RULES[name](drawn(4).half(), ones())


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"mean", "slsgd_1"}))
def test_every_rule_changes_something_under_attack(name: str) -> None:
    rows = drawn(5)
    rows[:F] = -20 * rows[F:].mean(0)
    if name == "robust_learning_rate":
        rows[F:, 1] = rows[F:, 1].abs() * torch.tensor([1.0, -1.0] * 4 + [1.0])  # no coordinate where the honest agree
    undefended, found = mean(rows, ones()).update, RULES[name](rows, ones()).update
    assert not torch.allclose(found, undefended, atol=1e-3)


# -- how far attackers reach -------------------------------------------------------------------------------------------


def attacked(seed: int, kind: str) -> torch.Tensor:
    rows = drawn(seed)
    huge = {"equal": 1e9, "apart": 1e9, "grand": 1e90, "random": 1e6}[kind]
    signs = torch.tensor([1.0, -1.0 if kind == "apart" else 1.0], dtype=torch.float64)
    rows[:F] = huge * signs[:, None]
    if kind == "random":
        rows[:F] = huge * torch.randn(F, D, generator=rng(seed), dtype=torch.float64)
    return rows


@pytest.mark.parametrize("kind", ["equal", "apart", "grand", "random"])
@pytest.mark.parametrize("seed", SEEDS)
def test_attackers_move_the_result_by_no_more_than_their_bound(seed: int, kind: str) -> None:
    rows = attacked(seed, kind)
    good, weights = rows[F:], ones()
    low, high, middle = good.amin(0), good.amax(0), good.mean(0)
    spread = float(robust.distances(good, middle).max())
    diameter = float(robust.squared_distances(good).max().sqrt())
    for name in ("coordinate_median", "trimmed_mean"):
        found = RULES[name](rows, weights).update
        assert bool(((found >= low) & (found <= high)).all()), name
    assert bool((2 * RULES["slsgd_2"](rows, weights).update <= high + 1e-9).all())
    found = RULES["bulyan"](rows, weights).update
    assert bool(((found >= low - (high - low)) & (found <= high + (high - low))).all())
    reach = diameter * (1 + math.sqrt((K - F - 2) / (K - 2 * F - 1)))
    for name in ("krum", "multi_krum"):
        assert float((RULES[name](rows, weights).update - middle).norm()) <= reach, name
    share = F / K
    found = RULES["geometric_median"](rows, weights).update
    assert float((found - middle).norm()) <= 2 * (1 - share) / (1 - 2 * share) * spread
    quiet = rows.clone()
    quiet[:F] = 0.0
    for name, most in (("norm_clip", 3.0 * F / K), ("cclip", 6.0 * F / K), ("cclip_steps", 18.0 * F / K)):
        gap = RULES[name](rows, weights).update - RULES[name](quiet, weights).update
        assert float(gap.norm()) <= most + 1e-9, name
    found = RULES["residual_reweighting"](rows, weights).update
    assert float((found - middle).norm()) <= 3 * diameter
    if kind in ("equal", "grand"):
        for name in ("three_sigma_krum", "three_sigma_median"):
            verdict = RULES[name](rows, weights)
            assert not verdict.kept[:F].any() and bool(((verdict.update >= low) & (verdict.update <= high)).all()), name


def test_float32_of_the_largest_size_does_no_harm() -> None:
    rows = drawn(0).float()
    rows[0], rows[1] = 3e38, -3e38
    by_length = RULES.keys() - ALIKE_IS_ODD - {"mean", "slsgd_1", "robust_learning_rate", "cross_round"}
    for name in sorted(by_length - {"outlier_detection"}):
        assert float(RULES[name](rows, ones()).update.abs().max()) < 10, name


def test_a_stated_weight_gives_no_more_than_one_vote() -> None:
    rows, loud = drawn(7), ones()
    loud[0] = 1e30
    for name in ("krum", "multi_krum", "bulyan", "coordinate_median", "trimmed_mean", "cclip", "residual_reweighting"):
        assert torch.equal(RULES[name](rows, loud).update, RULES[name](rows, ones()).update), name
    with pytest.raises(ConfigError, match="less than half"):
        RULES["geometric_median"](rows, loud)


# -- Krum, Bulyan ------------------------------------------------------------------------------------------------------


def krum_order(rows: numpy.ndarray, f: int) -> list[int]:
    """Numbers by score, straight from the definition."""
    n, scores = len(rows), []
    for i in range(n):
        to = sorted(float(sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True))) for j in range(n) if j != i)
        scores.append(sum(to[: max(n - f - 2, 1)]))
    return sorted(range(n), key=lambda i: (round(scores[i], 9), rows[i].tolist()))


@pytest.mark.parametrize("seed", SEEDS)
def test_krum_is_what_its_definition_says(seed: int) -> None:
    k, f = 5 + seed % 8, (2 + seed % 8) // 2
    rows = drawn(seed, k)
    order = krum_order(rows.numpy(), f)
    assert torch.equal(krum(rows, ones(k), f=f).update, rows[order[0]])
    for m in range(1, k - f + 1):
        found = multi_krum(rows, ones(k), f=f, m=m)
        assert set(found.kept.nonzero().flatten().tolist()) == set(order[:m])
        assert torch.allclose(found.update, rows[order[:m]].mean(0))


def test_krum_by_hand() -> None:
    rows = torch.tensor([[0.0], [1.0], [3.0], [3.5], [100.0]])
    # f=1: two nearest each: 0: 1+9, 1: 1+4, 3: .25+4, 3.5: .25+6.25, 100: far.
    assert robust.krum_scores(robust.squared_distances(rows), 1)[:4].tolist() == [10.0, 5.0, 4.25, 6.5]
    assert krum(rows, ones(5), f=1).update.tolist() == [3.0]


def test_multi_krum_of_all_is_the_mean_and_equal_scores_go_by_content() -> None:
    rows = drawn(0)
    assert torch.allclose(multi_krum(rows, ones(), f=0, m=K).update, rows.mean(0))
    pair = torch.tensor([[2.0, 5.0], [2.0, 4.0], [9.0, 9.0]])
    for order in ([0, 1, 2], [1, 0, 2], [2, 0, 1]):
        assert krum(pair[order], ones(3), f=0).update.tolist() == [2.0, 4.0]


def bulyan_by_hand(rows: numpy.ndarray, f: int) -> numpy.ndarray:
    left, chosen = list(range(len(rows))), []
    while len(chosen) < len(rows) - 2 * f:
        chosen.append(left.pop(krum_order(rows[left], f)[0]))
    found = []
    for values in rows[chosen].T.tolist():
        middle = float(numpy.median(values))
        found.append(numpy.mean(sorted(values, key=lambda v: (abs(v - middle), v))[: len(chosen) - 2 * f]))
    return numpy.array(found)


@pytest.mark.parametrize("seed", SEEDS)
def test_bulyan_is_what_its_definition_says(seed: int) -> None:
    f = seed % 3
    k = 4 * f + 3 + seed % 4
    rows = drawn(seed, k)
    assert numpy.allclose(bulyan(rows, ones(k), f=f).update.numpy(), bulyan_by_hand(rows.numpy(), f), atol=1e-12)
    assert torch.allclose(bulyan(rows, ones(k), f=0).update, rows.mean(0))


def test_bulyan_takes_the_smaller_of_two_as_near() -> None:
    rows = torch.tensor([[-2.0], [-1.0], [0.0], [1.0], [2.0], [50.0], [60.0]])
    # f=1 leaves 5 rows and keeps 3: with -2..2 left, -1, 0, 1.
    assert bulyan(rows, ones(7), f=1).update.item() == pytest.approx(float(bulyan_by_hand(rows.double().numpy(), 1)[0]))


# -- by coordinate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_medians_and_trimmed_means_by_brute_force(seed: int) -> None:
    k = 1 + seed
    rows = drawn(seed, k)
    columns = [sorted(column) for column in rows.T.tolist()]
    found = coordinate_median(rows, ones(k))
    assert numpy.allclose(found.update.numpy(), numpy.median(rows.numpy(), 0))
    for beta in (0.0, 0.1, 0.2, 0.3, 0.49):
        cut = math.floor(round(beta * k, 9))
        if 2 * cut >= k:
            continue
        wanted = [sum(column[cut : k - cut]) / (k - 2 * cut) for column in columns]
        found = trimmed_mean(rows, ones(k), beta=beta)
        assert numpy.allclose(found.update.numpy(), wanted)
        assert float(found.kept.sum()) == pytest.approx(k - 2 * cut)
    assert torch.allclose(trimmed_mean(rows, ones(k), beta=0.0).update, rows.mean(0))


def test_trimming_is_by_value_and_not_by_client_or_weight() -> None:
    rows = torch.tensor([[9.0, 0.0], [1.0, 9.0], [2.0, 1.0], [0.0, 2.0]])
    found = trimmed_mean(rows, torch.tensor([1.0, 2.0, 3.0, 4.0]), beta=0.25)
    assert found.update.tolist() == [1.5, 1.5] and found.kept.tolist() == [0.0, 0.5, 1.0, 0.5]
    rows = drawn(0, 100, 1)
    cut = rows.flatten().sort().values[29:71].mean()
    assert trimmed_mean(rows, ones(100), beta=0.29).update.item() == pytest.approx(float(cut))


def test_slsgd_moves_a_share_of_the_way() -> None:
    rows, weights = drawn(0), torch.rand(K, generator=rng()) + 0.1
    assert torch.allclose(slsgd(rows, weights, alpha=0.3).update, 0.3 * mean(rows, weights).update)
    found = slsgd(rows, weights, alpha=0.3, option=2, b=2)
    assert torch.allclose(found.update, 0.3 * trimmed_mean(rows, weights, beta=0.2).update)
    assert not slsgd(rows, weights, alpha=0.0).update.any()


def test_the_learning_rate_turns_where_too_few_agree() -> None:
    rows = torch.tensor([[1.0, 1.0, 0.0], [2.0, -1.0, 0.0], [3.0, 5.0, 3.0], [2.0, -1.0, 0.0]])
    found = robust_learning_rate(rows, ones(4), theta=2)
    assert found.update.tolist() == [2.0, -1.0, -0.75] and found.note == "Turned 2 of 3 coordinates."
    assert torch.equal(robust_learning_rate(rows, ones(4), theta=1).update, torch.tensor([2.0, -1.0, 0.75]))


# -- clips and the geometric median ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_clip_never_raises_a_norm(seed: int) -> None:
    rows, bound = drawn(seed) * 10 ** (seed % 5 - 2), 2.0
    found = norm_clip(rows, ones(), bound=bound)
    wanted = rows / (rows.norm(dim=1, keepdim=True) / bound).clamp_min(1.0)
    assert torch.allclose(found.update, wanted.mean(0))
    assert torch.allclose(found.kept, (bound / rows.norm(dim=1)).clamp_max(1.0))
    for row in rows:
        clipped = norm_clip(row[None], ones(1), bound=bound).update
        assert float(clipped.norm()) <= min(float(row.norm()), bound) * (1 + 1e-12)


def test_weights_count_where_a_rule_says_so() -> None:
    rows, weights = drawn(0), torch.arange(K, dtype=torch.float64)
    wanted = weights @ rows / weights.sum()
    assert torch.allclose(mean(rows, weights).update, wanted)
    assert torch.allclose(mean(rows, weights * 1e300).update, wanted)
    assert torch.allclose(norm_clip(rows, weights, bound=1e9).update, wanted)


def test_centred_clipping_goes_on_from_the_last_round() -> None:
    rows = drawn(0)
    first = cclip(rows, ones(), tau=1.0)
    assert first.memory is not None and torch.equal(first.memory["reference"], first.update)
    second = cclip(rows, ones(), tau=1.0, memory=first.memory)
    v = first.update
    gaps = rows - v
    wanted = v + (gaps * (1 / gaps.norm(dim=1, keepdim=True)).clamp_max(1.0)).mean(0)
    assert torch.allclose(second.update, wanted) and torch.equal(first.update, v)
    assert torch.allclose(cclip(rows, ones(), tau=1e6).update, rows.mean(0))
    assert torch.allclose(cclip(rows, ones(), tau=1e6, bucket=3, rng=rng(), f=1).update.sum(), rows.sum() / K, rtol=0.3)
    assert robust.cclip_radius(0.0) == 10.0 and robust.cclip_radius(0.9) == pytest.approx(100.0)


@pytest.mark.parametrize("size", [1, 2, 3, 5, K])
def test_buckets_hold_everybody_once(size: int) -> None:
    members = robust.buckets(K, size, rng(1))
    assert members.sum(0).tolist() == [1] * K and members.sum(1).tolist()[:-1] == [size] * (len(members) - 1)
    assert torch.equal(members, robust.buckets(K, size, rng(1)))
    rows, weights = drawn(1), torch.rand(K, generator=rng()) + 0.1
    means = torch.stack([(weights * m) @ rows.float() / (weights * m).sum() for m in members.float()])
    found = geometric_median(rows, weights, bucket=size, rng=rng(1))
    wanted = geometric_median(means.double(), members.float() @ weights)
    assert torch.allclose(found.update, wanted.update, atol=1e-4)


def objective(rows: torch.Tensor, weights: torch.Tensor, point: torch.Tensor) -> float:
    return float((weights.double() * (rows - point).norm(dim=1)).sum() / weights.sum())


@pytest.mark.parametrize("seed", SEEDS)
def test_no_point_is_nearer_to_all_than_the_geometric_median(seed: int) -> None:
    k = 3 + seed
    rows, weights = drawn(seed, k), torch.rand(k, generator=rng(seed)) + 0.5
    found = geometric_median(rows, weights, steps=1000)
    least = objective(rows, weights, found.update)
    z = rows.mean(0)
    for _ in range(600):  # the definition's fixed point, from another start
        pull = weights / (rows - z).norm(dim=1).clamp_min(1e-9)
        z = pull.double() @ rows / pull.sum()
    assert least == pytest.approx(objective(rows, weights, z), abs=1e-6) and found.note == ""
    for size in (1.0, 0.1, 0.01):
        for step in torch.randn(20, D, generator=rng(seed), dtype=torch.float64) * size:
            assert objective(rows, weights, found.update + step) >= least - 1e-6
    assert all(objective(rows, weights, row) >= least - 1e-6 for row in rows)


def test_the_geometric_median_leaves_a_row_it_starts_on() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.2], [1.0, -0.2], [-0.1, 5.0], [-0.1, -5.0]], dtype=torch.float64)
    assert coordinate_median(rows, ones(5)).update.tolist() == [0.0, 0.0]
    found = geometric_median(rows, ones(5), steps=5000)
    assert objective(rows, ones(5), found.update) < objective(rows, ones(5), rows[0]) - 0.01 and not found.note


def test_on_a_line_the_geometric_median_is_the_weighted_median() -> None:
    rows = torch.tensor([[0.0], [1.0], [2.0], [7.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 1.0, 2.5])
    assert geometric_median(rows, weights, steps=5000).update.item() == pytest.approx(2.0, abs=1e-4)
    # Equal weights are each their own: three equal clients outvote two others.
    twice = torch.tensor([[5.0], [5.0], [5.0], [0.0], [1.0]], dtype=torch.float64)
    assert geometric_median(twice, ones(5)).update.item() == pytest.approx(5.0, abs=1e-6)
    assert "Stopped after 1 steps" in geometric_median(drawn(0), ones(), steps=1).note


# -- odd clients -------------------------------------------------------------------------------------------------------


def trust_by_hand(history: numpy.ndarray) -> list[float]:
    n = len(history)
    cs = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(n):
            if i != j:
                cs[i][j] = history[i] @ history[j] / (numpy.linalg.norm(history[i]) * numpy.linalg.norm(history[j]))
    top = [max(0.0, *(cs[i][j] for j in range(n) if j != i)) for i in range(n)]
    found = []
    for i in range(n):
        row = [cs[i][j] * (top[i] / top[j] if top[i] < top[j] else 1.0) for j in range(n) if j != i]
        found.append(min(max(1 - max(row), 0.0), 1.0))
    best = max(found)
    logits = [math.inf if a == best else math.log(a / best / (1 - a / best)) + 0.5 if a else -math.inf for a in found]
    return [min(max(a, 0.0), 1.0) for a in logits]


@pytest.mark.parametrize("seed", SEEDS)
def test_foolsgold_is_what_its_definition_says_over_rounds_and_cohorts(seed: int) -> None:
    past: dict[str, numpy.ndarray] = {}
    memory = None
    for round in range(4):
        ids = [names(9)[i] for i in torch.randperm(9, generator=rng(100 * seed + round))[:6]]
        rows = torch.randn(6, D, generator=rng(1000 * seed + round), dtype=torch.float64)
        weights = torch.rand(6, generator=rng(seed)) + 0.5
        for client, row in zip(ids, rows.numpy(), strict=True):
            past[client] = past.get(client, 0) + row
        before, given = {client: held.clone() for client, held in (memory or {}).items()}, rows.clone()
        found = foolsgold(rows, weights, clients=ids, memory=memory)
        assert torch.equal(rows, given)
        wanted = torch.tensor(trust_by_hand(numpy.array([past[client] for client in ids])))
        assert torch.allclose(found.kept, wanted.double(), atol=1e-6)
        share = weights.double() * wanted
        assert torch.allclose(found.update, (share / share.sum()) @ rows, atol=1e-6)
        assert all(torch.equal((memory or {})[client], held) for client, held in before.items())
        memory = found.memory
        assert memory is not None and memory.keys() == past.keys()
        assert all(numpy.allclose(memory[client].numpy(), held) for client, held in past.items())


def test_foolsgold_drops_sybils_that_agree_and_keeps_who_is_alone() -> None:
    rows = torch.eye(8, dtype=torch.float64)[:6]
    rows[4:] = torch.ones(8)
    rows[5] *= 3  # sybils of another length are sybils
    found = foolsgold(rows, ones(6), clients=names(6))
    assert found.kept.tolist() == [1, 1, 1, 1, 0, 0] and torch.allclose(found.update, rows[:4].mean(0))
    assert foolsgold(rows[3:5], ones(2), clients=names(2)).kept.min() > 0  # a lone attacker is not seen
    for seed in SEEDS:  # cosines of 1 but for rounding: dividing by the largest trust must not bring them back
        sybils = drawn(seed)[:1] * torch.rand(5, 1, generator=rng(seed))
        assert not foolsgold(sybils, ones(5), clients=names(5)).kept.any()


def test_foolsgold_does_not_punish_clients_unlike_all_others() -> None:
    rows = torch.tensor([[1.0, 0.0], [-0.9, 0.1], [-1.0, -0.2]], dtype=torch.float64)
    found = foolsgold(rows, ones(3), clients=names(3))
    assert found.kept[0] == 1 and float(found.kept[1:].max()) < 1


def test_foolsgold_compares_the_columns_it_is_told() -> None:
    rows = drawn(0, 4)
    rows[2:, -2:] = rows[2, -2:]
    found = foolsgold(rows, ones(4), clients=names(4), columns=slice(-2, None))
    assert not found.kept[2:].any() and found.memory is not None and found.memory["c00"].shape == (2,)


@pytest.mark.parametrize("score", ["krum", "median", "foolsgold"])
def test_three_sigma_drops_who_lies_beyond(score: Any) -> None:
    for seed in SEEDS:
        rows = torch.randn(K, 200, generator=rng(seed))
        rows[:F] = 30 * torch.ones(200) + torch.randn(1, 200, generator=rng(seed))
        found = three_sigma(rows, ones(), score=score, width=1.9, f=F, clients=names(K))
        assert found.kept.tolist() == [False] * F + [True] * (K - F)
        assert (
            torch.allclose(found.update, rows[F:].mean(0), atol=1e-6)
            and found.note == "Dropped 2 of 11 clients: rows 0, 1."
        )
        only = torch.arange(K) == 1
        found = three_sigma(rows, ones(), score=score, width=1.9, f=F, clients=names(K), among=only)
        assert found.kept.tolist() == [True, False] + [True] * (K - F)


def test_three_sigma_scores_are_distances_to_the_middle() -> None:
    rows = drawn(3)
    for score, center in (
        ("median", geometric_median(rows, ones()).update),
        ("krum", rows[krum_order(rows.numpy(), 1)[: math.ceil(K / 2) - 1]].mean(0)),
    ):
        far = (rows - center).norm(dim=1).numpy()
        wanted = far <= far.mean() + 0.5 * far.std()
        assert three_sigma(rows, ones(), score=score, width=0.5, f=1).kept.tolist() == wanted.tolist()  # type: ignore[arg-type]


def test_three_sigma_fits_the_deviation_of_the_scores_at_hand() -> None:
    rows = torch.tensor([[0.0], [0.0], [0.0], [1.0]])  # the last lies sqrt(3) sigma above the mean
    assert three_sigma(rows, ones(4), score="median", width=1.73, f=1).kept.tolist() == [True, True, True, False]
    for k in range(3, 21):  # all as far, but for rounding
        assert three_sigma(0.1 * torch.eye(k), ones(k), score="median", width=1e-6).kept.all()


def test_one_far_attacker_hides_others_from_three_sigma() -> None:
    rows = drawn(0)
    rows[0], rows[1] = 1e12, 1e6
    assert three_sigma(rows, ones(), score="median", width=2.0, f=F).kept.tolist() == [False] + [True] * (K - 1)


def old(found: Verdict) -> dict[str, torch.Tensor]:
    assert found.memory is not None
    return found.memory


def test_the_past_tells_who_turned_and_who_did_nothing() -> None:
    model, ids = torch.linspace(3, 4, D, dtype=torch.float64), names(5)
    first = 0.1 * drawn(0, 5)
    found = cross_round(first, ones(5), clients=ids, model=model)
    assert found.kept.all() and torch.equal(old(found)["c01"], model + first[1])
    second = 0.1 * drawn(1, 5)
    second[2] = -2 * model  # turns round
    second[3] = first[3]  # the same weights again
    second[4] = -model  # all-zero weights
    later = cross_round(second, ones(5), clients=ids, model=model, lazy=1e-9, memory=found.memory)
    assert later.kept.tolist() == [True, True, False, False, False]
    assert torch.allclose(later.update, second[:2].mean(0))
    assert torch.equal(old(later)["c02"], old(found)["c02"]) and torch.equal(old(later)["c01"], model + second[1])
    found = cross_round(second, ones(5), clients=ids, model=model, memory=found.memory)
    assert found.kept.tolist() == [True, True, False, True, False]
    other = cross_round(second, ones(5), clients=["new", *ids[1:]], model=model, memory=found.memory)
    assert other.kept[0] and set(old(other)) == {"new", *ids}


def test_a_model_without_direction_counts_against_nobody_and_all_may_go() -> None:
    rows, zero = drawn(0), torch.zeros(D, dtype=torch.float64)
    assert cross_round(rows, ones(), clients=names(K), model=zero).kept.all()
    found = cross_round(-rows, ones(), clients=names(K), model=rows.mean(0) / 10)
    assert not found.kept.any() and not found.update.any() and found.note.startswith("No client was kept")


def test_outliers_are_looked_for_among_suspects_only() -> None:
    model, ids = 10 * torch.ones(D, dtype=torch.float64), names(K)
    calm = 0.1 * drawn(0)
    calm[5] = 4 * torch.ones(D)  # far out, but its model points as before
    first = outlier_detection(calm, ones(), clients=ids, model=model, f=1)
    assert first.kept.all()
    assert not three_sigma(calm, ones(), f=1, width=2.0).kept[5]
    turned = calm.clone()
    turned[0] = -20 * torch.ones(D)
    found = outlier_detection(turned, ones(), clients=ids, model=model, f=1, memory=first.memory, width=1.0)
    assert found.kept.tolist() == [False] + [True] * (K - 1)
    assert torch.equal(old(found)["c00"], old(first)["c00"]) and torch.equal(old(found)["c05"], model + calm[5])
    idle = outlier_detection(calm, ones(), clients=ids, model=model, f=1, memory=first.memory, lazy=1e-12)
    assert not idle.kept.any()


def residual_by_hand(rows: numpy.ndarray, breadth: float, threshold: float) -> numpy.ndarray:
    k, d = rows.shape
    total, corrected = numpy.zeros(k), rows.copy()
    x = numpy.arange(k)
    h = 1 / k + (x - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    for j in range(d):
        order = numpy.argsort(rows[:, j], kind="stable")
        y = rows[order, j]
        slope = numpy.median([numpy.median([(y[b] - y[a]) / (b - a) for b in x if b != a]) for a in x])
        line = numpy.median(y - slope * x) + slope * x
        r = y - line
        tau = 1.4826 * (1 + 5 / (k - 1)) * numpy.median(abs(r))
        e = r / tau
        psi = numpy.clip(e / numpy.sqrt(1 - h), -breadth * math.sqrt(2 / k), breadth * math.sqrt(2 / k))
        confidence = numpy.array(
            [1.0 if b == 0 else math.sqrt(1 - a) / b * c for a, b, c in zip(h, e, psi, strict=True)]
        )
        total[order] += confidence
        corrected[order, j] = numpy.where(confidence < threshold, line, y)
    weight = total**2
    return weight @ corrected / weight.sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_residual_reweighting_is_what_its_definition_says(seed: int) -> None:
    k = 4 + seed % 7
    rows = drawn(seed, k)
    rows[0] *= 1 + seed
    found = residual_reweighting(rows, ones(k), breadth=1.0, threshold=0.3)
    assert numpy.allclose(found.update.numpy(), residual_by_hand(rows.numpy(), 1.0, 0.3), atol=1e-9)
    assert float(found.kept.max()) == 1


# -- noise -------------------------------------------------------------------------------------------------------------


def test_weak_dp_adds_the_noise_of_every_upload() -> None:
    rows, weights = drawn(0, K, 40_000), torch.rand(K, generator=rng()) + 0.1
    found = weak_dp(rows, weights, sd=2.0, rng=rng(1))
    noise = found.update - mean(rows, weights).update
    shares = weights.double() / weights.sum()
    assert float(noise.std()) == pytest.approx(2.0 * float(shares.norm()), rel=0.02)
    assert abs(float(noise.mean())) < 0.02 and "no guarantee" in found.note
    assert torch.equal(found.update, weak_dp(rows, weights, sd=2.0, rng=rng(1)).update)
    clipped = weak_dp(rows, weights, sd=1e-9, rng=rng(1), bound=1.0)
    assert torch.allclose(clipped.update, norm_clip(rows, weights, bound=1.0).update, atol=1e-6)


def test_crfl_holds_the_global_model_to_its_norm() -> None:
    rows, model = drawn(0, K, 40_000), drawn(9, 1, 40_000)[0]
    quiet = crfl(rows, ones(), model=model, rho=2.0, sigma=0.1, rng=rng(1), last=True)
    assert float((model + quiet.update).norm()) == pytest.approx(2.0)
    after = model + rows.mean(0)
    assert torch.allclose(model + quiet.update, after * 2.0 / after.norm())
    noisy = crfl(rows, ones(), model=model, rho=2.0, sigma=0.1, rng=rng(1))
    assert float((noisy.update - quiet.update).std()) == pytest.approx(0.1, rel=0.02)
    small = crfl(rows, ones(), model=model, rho=1e6, sigma=0.1, rng=rng(1), last=True)
    assert torch.allclose(small.update, rows.mean(0)) and not small.note
    rows[0] = 1e100
    assert (
        float((model + crfl(rows, ones(), model=model, rho=2.0, sigma=0.1, rng=rng(), last=True).update).norm()) < 2.1
    )
    assert [anomaly.crfl_bound(t) for t in (0, 10)] == [2.0, 3.0]


def test_within_the_radius_a_smoothed_prediction_stays() -> None:
    sigma, first = 0.5, 0.9
    radius = smoothing_radius(first, 1 - first, sigma)
    # The worst case is a half-space: along its normal the probability falls to one half exactly at the radius.
    edge = sigma * NormalDist().inv_cdf(first)
    assert radius == pytest.approx(edge)
    assert NormalDist(0, sigma).cdf(edge - radius) == pytest.approx(0.5)
    assert smoothing_radius(0.4, 0.6, sigma) == 0.0
    for bad in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError):
            smoothing_radius(bad, 0.1, sigma)


def test_soteria_drops_the_units_that_tell_most() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh())
    data = torch.randn(4, 6, generator=rng(), requires_grad=True)
    representation = layer(data)
    sensitivity = torch.stack(
        [torch.autograd.grad(representation[:, u].sum(), data, retain_graph=True)[0].norm(dim=1) for u in range(10)], 1
    )
    representation = representation.detach()
    gradient = torch.randn(3, 10, generator=rng(1))
    wanted = (sensitivity / representation.abs()).sum(0)
    for share, count in ((0.0, 0), (0.01, 1), (0.3, 3), (1.0, 10)):
        found = soteria(gradient, representation, sensitivity, share=share)
        gone = (found == 0).all(0)
        assert int(gone.sum()) == count and torch.equal(found[:, ~gone], gradient[:, ~gone])
        assert count in (0, 10) or float(wanted[gone].max()) < float(wanted[~gone].min())
    dead = representation.clone()
    dead[:, 4] = 0.0
    assert bool((soteria(gradient, dead, torch.zeros(4, 10), share=0.9)[:, 4] != 0).all())
    for bad in ((gradient, representation[:, :3], sensitivity), (gradient, representation, sensitivity[:2])):
        with pytest.raises(ConfigError, match="Soteria was given shapes"):
            soteria(*bad)
    with pytest.raises(ConfigError, match="share=2"):
        soteria(gradient, representation, sensitivity, share=2)


def test_wbc_puts_noise_where_steps_hardly_change() -> None:
    step = torch.randn(40_000, generator=rng(), dtype=torch.float64)
    flat = torch.arange(40_000) % 2 == 0
    before = torch.where(flat, step, step + 1e3)
    found = wbc(step, before, lr=0.1, scale=2.0, rng=rng(1))
    noise = found - step
    assert not noise[~flat].any() and bool((noise[flat] != 0).all())
    assert float(noise[flat].std()) == pytest.approx(0.1 * 2.0 * math.sqrt(2), rel=0.03)
    assert float(noise[flat].mean()) == pytest.approx(0.0, abs=0.01)
    near = wbc(step, step + 0.1, lr=0.1, scale=2.0, rng=rng(1)) - step
    assert bool((near[near != 0].abs() >= 0.1 - 1e-12).all()) and (near > 0).any() and (near < 0).any()
    assert torch.equal(wbc(step, None, lr=0.1, scale=2.0, rng=rng()), step)
    with pytest.raises(ConfigError, match="One shape"):
        wbc(step, step[:3], lr=0.1, scale=2.0, rng=rng())
    with pytest.raises(ConfigError, match="scale=0"):
        wbc(step, step, lr=0.1, scale=0.0, rng=rng())


# -- what is refused ---------------------------------------------------------------------------------------------------

MODEL = torch.ones(D, dtype=torch.float64)


@pytest.mark.parametrize(
    ("rule", "k", "options", "why"),
    [
        (krum, 6, {"f": 2}, r"K=6 clients and f=2 attackers\. It needs f >= 0 and K >= 2f\+3 = 7\. Did you mean 'f=1'"),
        (krum, 6, {"f": -1}, "Did you mean 'f=1'"),
        (multi_krum, 7, {"f": 2, "m": 6}, "m: 1 to K-f=5"),
        (multi_krum, 7, {"f": 2, "m": 0}, "m=0"),
        (bulyan, 10, {"f": 2}, r"K >= 4f\+3 = 11"),
        (coordinate_median, 4, {"f": 2}, r"K >= 2f\+1 = 5"),
        (trimmed_mean, 10, {"beta": 0.5}, "beta=0.5"),
        (trimmed_mean, 10, {"beta": math.nan}, "beta=nan"),
        (trimmed_mean, 10, {"beta": 0.1, "f": 2}, "drops 1 values at each end"),
        (geometric_median, 4, {"f": 2}, r"K >= 2f\+1"),
        (geometric_median, 4, {"smoothing": 0.0}, "smoothing=0"),
        (geometric_median, 9, {"f": 2, "bucket": 3, "rng": rng()}, "K=3 clients and f=2"),
        (geometric_median, 9, {"bucket": 3}, "no generator"),
        (norm_clip, 3, {"bound": 0.0}, "bound=0"),
        (norm_clip, 3, {"bound": math.inf}, "bound=inf"),
        (cclip, 3, {"tau": -1.0}, "tau=-1"),
        (cclip, 9, {"tau": 1.0, "bucket": 3, "f": 2, "rng": rng()}, "K=3 clients and f=2"),
        (cclip, 3, {"tau": 1.0, "bucket": 4}, "Allowed: 1 to 3. Did you mean '3'"),
        (cclip, 3, {"tau": 1.0, "memory": {"reference": torch.zeros(3)}}, "memory of centred clipping"),
        (slsgd, 4, {"alpha": 1.1}, "alpha=1.1"),
        (slsgd, 4, {"alpha": 1.0, "option": 3}, "option=3"),
        (slsgd, 4, {"alpha": 1.0, "b": 1}, "Take option 2"),
        (slsgd, 4, {"alpha": 1.0, "option": 2, "b": 2}, "drops 2 values"),
        (slsgd, 4, {"alpha": 1.0, "option": 2, "b": 1, "f": 2}, "with f=2 attackers"),
        (robust_learning_rate, 6, {"theta": 2, "f": 2}, "f < theta <= K-2f"),
        (robust_learning_rate, 6, {"theta": 0}, "theta=0"),
        (robust_learning_rate, 6, {"theta": 5, "f": 1}, "theta=5"),
        (foolsgold, 2, {"clients": ["a", "a"]}, "each once"),
        (foolsgold, 2, {"clients": ["a"]}, "One id per row"),
        (foolsgold, 1, {"clients": ["a"], "memory": {"a": torch.zeros(3)}}, "memory of client 'a'"),
        (foolsgold, 1, {"clients": ["a"], "columns": slice(9, 12)}, "none of 7"),
        (three_sigma, 6, {"score": "krumm"}, "Did you mean 'krum'"),
        (three_sigma, 6, {"f": 2}, r"K >= 2f\+3 = 7"),
        (three_sigma, 10, {"f": 2, "width": 2.0, "score": "median"}, "at most 2 sigma"),
        (three_sigma, 10, {"width": 0.0}, "width=0"),
        (cross_round, 1, {"clients": ["a"], "model": torch.zeros(3)}, r"shape \(3,\)"),
        (cross_round, 1, {"clients": ["a"], "model": MODEL, "bound": 1.5}, "a cosine"),
        (cross_round, 1, {"clients": ["a"], "model": MODEL, "lazy": 0.0}, "lazy=0"),
        (outlier_detection, 6, {"clients": names(6), "model": MODEL, "f": 2}, r"2f\+3 = 7"),
        (residual_reweighting, 2, {}, r"2f\+3 = 3"),
        (residual_reweighting, 5, {"f": 2}, r"2f\+2 = 6"),
        (residual_reweighting, 5, {"threshold": 2.0}, "threshold is 2"),
        (residual_reweighting, 5, {"breadth": -1.0}, "breadth=-1"),
        (weak_dp, 3, {"sd": 0.0, "rng": rng()}, "sd=0"),
        (crfl, 3, {"model": MODEL, "rho": 0.0, "sigma": 1.0, "rng": rng()}, "rho=0"),
        (crfl, 3, {"model": torch.ones(2), "rho": 1.0, "sigma": 1.0, "rng": rng()}, r"Expected \(7,\)"),
    ],
)
def test_an_assumption_that_does_not_hold_is_refused(rule: Rule, k: int, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        rule(drawn(0, k), ones(k), **options)


@pytest.mark.parametrize("momentum", [1.0, -0.1, math.nan])
def test_a_momentum_is_below_one(momentum: float) -> None:
    with pytest.raises(ConfigError, match="momentum"):
        robust.cclip_radius(momentum)


# -- on a task ---------------------------------------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[numpy.ndarray, numpy.ndarray]:
    return pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)


def digits_accuracy(
    rule: Rule, attack: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None, seed: int
) -> float:
    """Digits, softmax regression, 10 IID clients of which 2 attack, 12 rounds: test accuracy of the global model."""
    data, target = digits()
    order = numpy.random.default_rng(seed).permutation(len(target))
    x = torch.tensor(numpy.c_[data[order] / 16, numpy.ones(len(order))], dtype=torch.float32)
    y = torch.tensor(target[order])
    inputs, answers = x[:1400].view(10, 140, 65), torch.nn.functional.one_hot(y[:1400], 10).float().view(10, 140, 10)
    model = torch.zeros(650)
    for _ in range(12):
        local = model.view(1, 65, 10).repeat(10, 1, 1)
        for _ in range(5):
            local = local - inputs.mT @ ((inputs @ local).softmax(2) - answers) / 140
        rows = local.view(10, 650) - model
        if attack is not None:
            rows = torch.stack([attack(row, model) if i < 2 else row for i, row in enumerate(rows)])
        model = model + rule(rows, torch.ones(10), names(10)).update
    return float(((x[1400:] @ model.view(65, 10)).argmax(1) == y[1400:]).double().mean())


DEFENCES: dict[str, Rule] = {
    "coordinate_median": plain(coordinate_median, f=2),
    "trimmed_mean": plain(trimmed_mean, beta=0.2, f=2),
    "krum": plain(krum, f=2),
    "multi_krum": plain(multi_krum, f=2, m=6),
    "geometric_median": plain(geometric_median, f=2),
    "norm_clip": plain(norm_clip, bound=1.0),
    "cclip": plain(cclip, tau=1.0, f=2),
    "three_sigma": plain(three_sigma, f=2),
    "residual_reweighting": plain(residual_reweighting, f=2),
}


@pytest.mark.effect
@pytest.mark.parametrize("kind", ["flip", "random"])
def test_attacks_spoil_the_mean_and_not_the_robust_rules(kind: str) -> None:
    noise = rng()

    def attack(row: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
        return malice.sign_flip(row, 10.0) if kind == "flip" else 5 * malice.byzantine_random(model, noise)

    clean, spoilt = digits_accuracy(plain(mean), None, 0), digits_accuracy(plain(mean), attack, 0)
    assert clean > 0.85 and spoilt < clean - 0.25
    for name, rule in DEFENCES.items():
        found = digits_accuracy(rule, attack, 0)
        assert found > (0.6 if name in ("norm_clip", "cclip") else clean - 0.06), f"{name}: {found}"
