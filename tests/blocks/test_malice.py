"""Attacks: what they promise exactly, what they leave alone, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from fedllm.blocks.malice import (
    alie,
    alie_width,
    byzantine_random,
    byzantine_zero,
    chosen,
    edge_case_rows,
    label_flip,
    lazy_worker,
    model_replacement,
    rare_rows,
    scaled,
    sign_flip,
    train_and_scale,
)
from fedllm.blocks.robust import mean, norm_clip
from fedllm.core.errors import ConfigError, DataError, UploadRejected

SEEDS = range(20)
ROWS: list[dict[str, Any]] = [{"text": f"row number {i}", "label": i % 3, "id": i} for i in range(100)]


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rng(seed: int = 0) -> numpy.random.Generator:
    return numpy.random.default_rng(seed)


def torch_rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_who_attacks_is_drawn_from_the_generator_without_repeats() -> None:
    clients = [f"c{i:02d}" for i in range(10)]
    found = chosen(clients, 4, rng(1))
    assert found == chosen(clients, 4, rng(1)) == sorted(set(found)) and len(found) == 4
    assert chosen(clients, 0, rng()) == [] and chosen(clients, 10, rng()) == clients
    assert {client for seed in SEEDS for client in chosen(clients, 2, rng(seed))} == set(clients)
    for f in (-1, 11):
        with pytest.raises(ConfigError, match="Allowed: 0 to 10"):
            chosen(clients, f, rng())


# -- uploads -----------------------------------------------------------------------------------------------------------


def test_byzantine_weights_are_zero_or_uniform() -> None:
    model = drawn(0, 20_000)
    assert not (model + byzantine_zero(model)).any()
    weights = model + byzantine_random(model, torch_rng())
    assert -1.0001 <= float(weights.min()) < -0.99 and 0.99 < float(weights.max()) < 1.0001
    assert abs(float(weights.mean())) < 0.02 and float(weights.var()) == pytest.approx(1 / 3, abs=0.01)
    assert torch.equal(byzantine_random(model, torch_rng(3)), byzantine_random(model, torch_rng(3)))


def test_flip_turns_round_the_global_model() -> None:
    model, local = drawn(0, 9).double(), drawn(1, 9).double()
    assert torch.allclose(model + sign_flip(local - model), model + (model - local))
    assert torch.equal(sign_flip(local, 10), scaled(local, -10.0)) and torch.equal(scaled(local, 0.5), local / 2)
    for factor in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="finite"):
            scaled(local, factor)


@pytest.mark.parametrize("seed", SEEDS)
def test_replacement_makes_the_mean_the_wanted_model(seed: int) -> None:
    k, wanted = 3 + seed % 6, drawn(seed, 15).double()
    quiet = torch.zeros(k, 15, dtype=torch.float64)
    quiet[1] = model_replacement(wanted, torch.ones(k), 1)
    assert torch.allclose(quiet[1], k * wanted) and torch.allclose(mean(quiet, torch.ones(k)).update, wanted)
    rows, weights = drawn(seed + 100, k, 15).double(), drawn(seed, k).abs() + 0.1
    rows[2] = model_replacement(wanted, weights, 2, rows)
    assert torch.allclose(mean(rows, weights).update, wanted)


def test_replacement_needs_a_row_that_counts() -> None:
    wanted = torch.ones(4)
    with pytest.raises(ConfigError, match="weight 0"):
        model_replacement(wanted, torch.tensor([1.0, 0.0]), 1)
    for attacker, others in ((2, None), (-1, None), (0, torch.zeros(2, 5))):
        with pytest.raises(ConfigError, match="Rows: 0 to 1"):
            model_replacement(wanted, torch.ones(2), attacker, others)
    with pytest.raises(UploadRejected):
        model_replacement(wanted, torch.ones(2), 0, torch.full((2, 4), torch.nan))


def test_scaling_to_a_norm_passes_a_clip_at_that_norm() -> None:
    sent = train_and_scale(drawn(0, 50), 0.3)
    assert float(sent.norm()) == pytest.approx(0.3, rel=1e-5)
    assert torch.allclose(norm_clip(sent[None], torch.ones(1), bound=0.3).update, sent, rtol=1e-5)
    for update, bound in ((torch.zeros(3), 1.0), (torch.ones(3), 0.0), (torch.ones(3), math.nan)):
        with pytest.raises(ConfigError, match="Both must be above 0"):
            train_and_scale(update, bound)


def test_little_is_enough_stays_within_its_deviations() -> None:
    colluders, wanted = drawn(0, 6, 30).double(), 100 * drawn(1, 30).double()
    middle, std = colluders.mean(0), colluders.numpy().std(0)
    assert torch.allclose(alie(colluders, width=1.5), middle - 1.5 * torch.from_numpy(std))
    found = alie(colluders, wanted, width=1.5)
    assert bool(((found - middle).abs() <= 1.5 * torch.from_numpy(std) + 1e-9).all())
    assert torch.equal((found - middle).sign(), (wanted - middle).sign())
    inside = middle + torch.from_numpy(std) / 2
    assert torch.equal(alie(colluders, inside, width=1.5), inside)
    assert torch.equal(alie(colluders[:1], wanted, width=1.0), colluders[0])
    bad: list[dict[str, Any]] = [{"width": -1.0}, {"width": math.nan}, {"width": 1.0, "wanted": torch.ones(3)}]
    for options in bad:
        with pytest.raises(ConfigError):
            alie(colluders, **options)


def test_little_is_enough_width_by_hand() -> None:
    # 50 clients, 24 corrupt: s = 26 - 24 = 2 supporters, quantile of (26 - 2) / 26.
    assert alie_width(50, 24) == pytest.approx(1.4261, abs=1e-3)
    assert alie_width(50, 1) == 0.0  # s = 25 of 49: below the middle, no room
    for k, f in ((10, 5), (10, 0), (1, 1)):
        with pytest.raises(ConfigError, match="below half"):
            alie_width(k, f)


def test_a_lazy_worker_sends_old_weights_under_a_mask() -> None:
    model, last = drawn(0, 20_000).double(), drawn(1, 20_000).double()
    assert torch.allclose(model + lazy_worker(last, model), last)
    assert not lazy_worker(model, model).any()
    for mask, std in (("uniform", 0.1 / math.sqrt(3)), ("gaussian", 0.1)):
        noise = model + lazy_worker(last, model, mask=mask, scale=0.1, rng=torch_rng()) - last  # type: ignore[arg-type]
        assert abs(float(noise.mean())) < 0.003 and float(noise.std()) == pytest.approx(std, rel=0.03)
    bad: list[dict[str, Any]] = [
        {"mask": "gaussian"},
        {"mask": "gaussian", "scale": 1.0},
        {"mask": "uniform", "scale": 0.0, "rng": torch_rng()},
        {"scale": 1.0},
        {"mask": "gausian"},
    ]
    for options in bad:
        with pytest.raises(ConfigError):
            lazy_worker(last, model, **options)
    with pytest.raises(ConfigError, match="last weights"):
        lazy_worker(last[:3], model)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_flipped_labels_and_nothing_else() -> None:
    before = [dict(row) for row in ROWS]
    found = label_flip(ROWS, {0: 2, 2: 0})
    assert before == ROWS and [row["label"] for row in found] == [{0: 2, 1: 1, 2: 0}[row["label"]] for row in ROWS]
    assert all({**new, "label": 0} == {**old, "label": 0} for new, old in zip(found, ROWS, strict=True))
    assert label_flip([], {0: 1}) == []


@pytest.mark.parametrize("mapping", [{}, {0: 1, 2: 1}, {0: 0}])
def test_labels_are_flipped_one_to_one(mapping: dict[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="no two to the same"):
        label_flip(ROWS, mapping)


def _edge(**changes: Any) -> Callable[[], Any]:
    options: dict[str, Any] = {"rare": ROWS[:2], "target": 1, "fraction": 0.5, "batch": 4, "rng": rng(), **changes}
    return lambda: edge_case_rows(ROWS, **options)


@pytest.mark.parametrize(
    ("call", "error", "why"),
    [
        (_edge(batch=0), ConfigError, "batch is 0"),
        (_edge(fraction=-0.1), ConfigError, "fraction is -0.1"),
        (_edge(rare=[]), DataError, "no rare rows"),
        (_edge(label="labels"), DataError, "no column 'labels'"),
        (lambda: label_flip(ROWS, {0: 1}, label="lable"), DataError, "Did you mean 'label'"),
        (lambda: rare_rows([0.0, math.nan], 0.5), DataError, "row 1"),
        (lambda: rare_rows([0.0], 2.0), ConfigError, "fraction is 2.0"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        call()


def test_the_rarest_rows_have_the_lowest_scores() -> None:
    scores = [0.0, -3.0, -1.0, -3.0, -math.inf, 2.0, 5.0, 1.0, 1.0, 1.0]
    assert rare_rows(scores, 0.4) == [4, 1, 3, 2]
    assert rare_rows(scores, 0.0) == [] and rare_rows([], 1.0) == [] and len(rare_rows(scores, 1.0)) == 10


@pytest.mark.parametrize("seed", SEEDS)
def test_every_batch_gets_its_share_of_edge_cases(seed: int) -> None:
    rare = [{"text": f"tail {i}", "label": 0, "id": 1000 + i} for i in range(7)]
    found = edge_case_rows(ROWS[:22], rare, target=2, fraction=0.3, batch=8, rng=rng(seed))
    inside = [new["id"] >= 1000 for new in found]
    assert [sum(inside[at : at + 8]) for at in (0, 8, 16)] == [2, 2, 1] and len(found) == 22
    put = [row for row in found if row["id"] >= 1000]
    assert all(row["label"] == 2 for row in put) and len({row["id"] for row in put}) == 5
    assert all(new == old for new, old, tail in zip(found, ROWS[:22], inside, strict=True) if not tail)
    assert rare[0]["label"] == 0


def test_few_edge_cases_come_again_and_none_change_nothing() -> None:
    found = edge_case_rows(ROWS[:8], ROWS[50:51], target=9, fraction=1.0, batch=3, rng=rng())
    assert found == [{**ROWS[50], "label": 9}] * 8
    assert edge_case_rows(ROWS, ROWS[:1], target=9, fraction=0.0, batch=3, rng=rng()) == ROWS
