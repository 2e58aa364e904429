from __future__ import annotations

import json
import math
import random

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import ConfigError, DataError
from fedllm.evaluate.clients import bootstrap, summarise

VALUES = st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=30)


def scores(values, sizes=None) -> dict[str, dict[str, float]]:
    sizes = sizes or [10] * len(values)
    return {f"c{n:02d}": {"n": size, "acc": value} for n, (value, size) in enumerate(zip(values, sizes, strict=True))}


def test_by_hand() -> None:
    found = summarise(scores([0.2, 0.4, 0.9], [10, 10, 20]), "acc")
    assert found.clients == 3
    assert found.mean == pytest.approx(0.5)
    assert found.weighted_mean == pytest.approx((2 + 4 + 18) / 40)
    assert found.std == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 3))
    assert (found.min, found.max) == (0.2, 0.9)
    assert found.percentile_10 == pytest.approx(0.24)
    assert found.worst_10_percent == pytest.approx(0.2)
    assert found.jain == pytest.approx(1.5**2 / (3 * (0.04 + 0.16 + 0.81)))
    low, high = found.interval
    assert 0.2 <= low < 0.5 < high <= 0.9


def test_worst_is_the_high_end_of_a_loss() -> None:
    values = [float(n) for n in range(1, 21)]
    down, up = summarise(scores(values), "acc", higher_is_better=False), summarise(scores(values), "acc")
    assert down.worst_10_percent == pytest.approx(19.5)
    assert up.worst_10_percent == pytest.approx(1.5)
    assert down.percentile_10 == pytest.approx(18.1)
    assert up.percentile_10 == pytest.approx(2.9)


def test_equal_scores_are_fair() -> None:
    assert summarise(scores([0.3] * 7), "acc").jain == pytest.approx(1)
    assert summarise(scores([0.0] * 3), "acc").jain is None
    assert summarise(scores([1.0, 0, 0, 0]), "acc").jain == pytest.approx(0.25)


def test_gain_and_share_improved() -> None:
    now, then = scores([0.5, 0.6, 0.7, 0.1]), scores([0.4, 0.6, 0.9])
    gain = summarise(now, "acc", reference=then).gain
    assert gain.clients == 3
    assert gain.mean == pytest.approx((0.1 + 0 - 0.2) / 3)
    assert (gain.improved, gain.worsened) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    loss = summarise(now, "acc", reference=then, higher_is_better=False).gain
    assert loss.mean == pytest.approx(-gain.mean)
    assert summarise(now, "acc", reference={}).gain is None
    assert summarise(now, "acc").gain is None


def test_given_weights_replace_the_sizes() -> None:
    found = summarise(scores([0.0, 1.0]), "acc", weights={"c00": 1, "c01": 3, "other": 9})
    assert found.weighted_mean == 0.75
    with pytest.raises(ConfigError, match="c01 has no weight"):
        summarise(scores([0.0, 1.0]), "acc", weights={"c00": 1})
    with pytest.raises(DataError, match="negative"):
        summarise(scores([0.0, 1.0]), "acc", weights={"c00": 1, "c01": -1})


def test_unknown_weights_leave_the_weighted_mean_out() -> None:
    found = summarise({"a": {"n": None, "acc": 0.5}, "b": {"n": 3, "acc": 0.7}}, "acc")
    assert (found.weighted_mean, found.weighted_interval) == (None, None)
    assert found.mean == pytest.approx(0.6)


def test_what_is_not_measured_is_missing_and_never_nan() -> None:
    found = summarise({"b": {"n": 0, "acc": None}, "a": {"n": 4, "acc": 0.5}}, "acc")
    assert (found.clients, found.missing, found.mean, found.interval) == (1, ["b"], 0.5, None)
    nothing = summarise({"b": {"n": 0, "acc": None}}, "acc")
    assert (nothing.reason, nothing.mean, nothing.missing) == ("No client has a value.", None, ["b"])
    assert summarise({}, "acc").reason == "No client was measured."
    with pytest.raises(DataError, match="is nan"):
        summarise(scores([math.nan]), "acc")
    with pytest.raises(ConfigError, match="Did you mean 'acc'"):
        summarise(scores([0.5]), "acx")


def test_to_dict_is_json() -> None:
    found = summarise(scores([0.1, 0.2, 0.4]), "acc", reference=scores([0.0, 0.1, 0.2])).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert isinstance(found["gain"]["interval"], list)
    assert found["metric"] == "acc"


@settings(max_examples=30, deadline=None)
@given(VALUES, st.integers(0, 9))
def test_order_does_not_matter_and_the_seed_decides(values: list[float], seed: int) -> None:
    table = scores(values)
    names = list(table)
    random.Random(seed).shuffle(names)
    shuffled = {name: table[name] for name in names}
    assert summarise(shuffled, "acc", seed=seed) == summarise(table, "acc", seed=seed)


@settings(max_examples=30, deadline=None)
@given(VALUES)
def test_everything_lies_between_the_extremes(values: list[float]) -> None:
    found = summarise(scores(values), "acc")
    for name in ("mean", "weighted_mean", "percentile_10", "worst_10_percent"):
        assert found.min - 1e-12 <= getattr(found, name) <= found.max + 1e-12
    assert found.worst_10_percent <= found.mean + 1e-12
    assert found.jain is None or 1 / len(values) - 1e-9 <= found.jain <= 1


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    stream = numpy.random.default_rng(3)
    hits = 0
    for trial in range(200):
        values = stream.normal(0.5, 0.1, 40)
        low, high = bootstrap(values, numpy.ones(40), trial, 400)
        hits += low <= 0.5 <= high
    assert 0.88 <= hits / 200 <= 0.98


def test_a_large_federation_is_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = numpy.random.default_rng(0).uniform(size=500)
    whole = bootstrap(values, numpy.ones(500), 1)
    monkeypatch.setattr("fedllm.evaluate.clients.BLOCK", 500 * 7)
    assert bootstrap(values, numpy.ones(500), 1) == whole
