"""Train - schedules against hand-computed rates, counted steps, and settings that make no sense."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedllm.core.errors import ConfigError
from fedllm.core.train import Schedule, Train


def factors(total: int, **options: Any) -> list[float]:
    return [round(Schedule(**options).factor(done, total), 9) for done in range(total)]


def test_constant() -> None:
    assert factors(4) == [1.0] * 4


def test_linear() -> None:
    assert factors(4, kind="linear") == [1.0, 0.75, 0.5, 0.25]
    assert factors(4, kind="linear", final=0.2) == [1.0, 0.8, 0.6, 0.4]


def test_cosine() -> None:
    half = math.sqrt(0.5)
    expected = [1.0, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert factors(4, kind="cosine") == [round(x, 9) for x in expected]
    assert factors(4, kind="cosine", final=0.5) == [round(0.5 + 0.5 * x, 9) for x in expected]


def test_warm_up() -> None:
    assert factors(10, warmup=0.3) == [round(x, 9) for x in (1 / 3, 2 / 3, 1.0)] + [1.0] * 7
    assert factors(6, kind="linear", warmup=0.5, final=0.0) == [round(x, 9) for x in (1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3)]
    assert factors(3, warmup=0.1) == [1.0, 1.0, 1.0], "a share of less than one unit is one unit at the full rate"
    assert factors(1, kind="cosine", warmup=0.9) == [1.0]


@pytest.mark.parametrize(
    ("warmup", "total", "units"), [(0.07, 100, 7), (0.14, 50, 7), (0.1, 30, 3), (0.55, 100, 55), (0.29, 100, 29)]
)
def test_the_warm_up_is_as_long_as_it_says(warmup: float, total: int, units: int) -> None:
    """0.07 * 100 is a little more than 7 in floating point; it must not become 8."""
    found = factors(total, warmup=warmup)
    assert found[:units] == [round((n + 1) / units, 9) for n in range(units)]
    assert sum(f < 1 for f in found) == units - 1


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.floats(0, 0.99),
    st.floats(0, 1),
    st.integers(1, 60),
    st.integers(0, 120),
)
@settings(max_examples=300, deadline=None)
def test_a_factor_is_never_negative_and_never_above_one(
    kind: Any, warmup: float, final: float, total: int, done: int
) -> None:
    """Beyond the end of the run as well: a negative rate would climb the loss."""
    schedule = Schedule(kind=kind, warmup=warmup, final=final)
    factor = schedule.factor(done, total)
    assert 0 <= factor <= 1 + 1e-12
    warm = math.ceil(round(warmup * total, 6))
    if done >= total > warm and kind != "constant":
        assert factor == pytest.approx(final, abs=1e-9)
    if warm <= done < total - 1:
        assert factor >= schedule.factor(done + 1, total) - 1e-12, "it only falls after the warm-up"


def test_rates_by_round_are_constant_inside_a_round() -> None:
    train = Train(lr=0.2, steps=5, schedule=Schedule(kind="linear"))
    assert [train.rate(r, 4, s, 5) for r in (1, 2, 4) for s in range(5)] == pytest.approx(
        [0.2] * 5 + [0.15] * 5 + [0.05] * 5
    )


def test_rates_by_step_count_the_steps_of_all_rounds() -> None:
    train = Train(lr=0.8, steps=2, schedule=Schedule(kind="linear", by="step"))
    found = [train.rate(r, 2, s, 2) for r in (1, 2) for s in range(2)]
    assert found == pytest.approx([0.8, 0.6, 0.4, 0.2])
    warm = Train(lr=1.0, steps=2, schedule=Schedule(by="step", warmup=0.75))
    assert [warm.rate(r, 2, s, 2) for r in (1, 2) for s in range(2)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


@pytest.mark.parametrize(
    ("options", "examples", "steps"),
    [
        ({}, 100, 10),
        ({"steps": 3}, 1, 3),
        ({"steps": 3}, 0, 0),
        ({"epochs": 1, "batch_size": 4}, 8, 2),
        ({"epochs": 1, "batch_size": 4}, 9, 3),
        ({"epochs": 3, "batch_size": 4}, 9, 9),
        ({"epochs": 1, "batch_size": 4}, 1, 1),
        ({"epochs": 2, "batch_size": 4}, 0, 0),
        ({"epochs": 1, "batch_size": 4, "accumulate": 2}, 16, 2),
        ({"epochs": 1, "batch_size": 4, "accumulate": 2}, 17, 3),
    ],
)
def test_step_count(options: dict[str, int], examples: int, steps: int) -> None:
    assert Train(**options).step_count(examples) == steps  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 3, "epochs": 1}, r"train.steps=3 and train.epochs=1 are both given\. Only one may be\. Remove"),
        ({"momentum": 0.9}, r"momentum=0.9 has no meaning for adamw.*Set train.optimizer=sgd"),
        ({"epochs": 1, "schedule": {"by": "step"}}, r"same number of steps at every client.*train.steps"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Train(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"epochs": 0},
        {"batch_size": 0},
        {"accumulate": 0},
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": "fast"},
        {"optimizer": "adam"},
        {"optimizer": "sgd", "momentum": 1.0},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"betas": (0.9,)},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"clip_norm": 0.0},
        {"clip_norm": float("inf")},
        {"learning_rate": 1.0},
        {"schedule": {"kind": "step"}},
        {"schedule": {"warmup": 1.0}},
        {"schedule": {"final": 1.5}},
        {"schedule": {"final": float("nan")}},
        {"schedule": {"rounds": 3}},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Train(**options)


def test_settings_cannot_be_changed_and_are_documented() -> None:
    with pytest.raises(ValidationError):
        Train().lr = 2.0
    for kind in (Train, Schedule):
        assert all(field.description for field in kind.model_fields.values())


def test_equal_settings_are_equal_keys() -> None:
    assert Train(steps=3) == Train(steps=3)
    assert hash(Train(steps=3)) == hash(Train(steps=3))
    assert Train(steps=3) != Train(steps=4)


def test_before_the_first_round_the_rate_is_that_of_the_first() -> None:
    """A protocol that never counts rounds asks in round 0."""
    for schedule in (Schedule(), Schedule(kind="linear"), Schedule(kind="cosine", warmup=0.5)):
        train = Train(lr=0.5, steps=3, schedule=schedule)
        assert train.rate(0, 4, 0, 3) == train.rate(1, 4, 0, 3)
