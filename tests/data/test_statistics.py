"""Statistics: numbers that can be worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.data.federation import Federation
from fedllm.data.statistics import gini, heterogeneity, length, statistics


def client(train, labels="", held=0):
    rows = [{"text": "ab", "label": labels[n % len(labels)]} if labels else {"text": "ab"} for n in range(train)]
    return {"train": rows, "eval": rows[:1] * held}


def test_a_small_federation_by_hand():
    found = statistics(
        Federation.of({"a": client(4, "x", 2), "b": client(4, "y"), "c": client(8, "xy")}, {"a": "Anna"})
    )
    one = found.clients["a"]
    assert (one.train, one.eval, one.characters, one.labels) == (4, 2, 12, {"x": 4})
    assert found.clients["c"].labels == {"x": 4, "y": 4}
    assert (found.mean, found.smallest, found.largest, found.ratio) == (16 / 3, 4, 8, 2.0)
    assert found.gini == pytest.approx(1 / 6) and found.heterogeneity == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found.label_column == "label"


def test_it_is_ready_for_json():
    values = statistics(Federation.of({"a": client(3, "xy"), "b": client(1)})).to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["total"] == {"clients": 2, "train": 4, "eval": 0, "characters": 11}
    assert values["clients"]["a"]["name"] == "a" and values["clients"]["b"]["labels"] == {}


def test_what_cannot_be_known_is_none():
    found = statistics(Federation.of({"a": client(2), "b": client(0)}))
    assert found.heterogeneity is None and found.label_column is None and found.ratio is None
    assert found.clients["a"].labels is None and found.warnings == ["1 client has no training rows: b."]
    assert gini([0, 0]) is None and heterogeneity([]) is None and heterogeneity([{}]) is None


def test_extremes_of_the_coefficients():
    assert gini([5, 5, 5]) == 0 and gini([0] * 99 + [7]) == pytest.approx(0.99)
    assert heterogeneity([{"a": 2, "b": 2}, {"a": 5, "b": 5}]) == 0
    assert heterogeneity([{str(n): 3} for n in range(10)]) == pytest.approx(0.9)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any))
def test_gini_is_half_the_relative_mean_difference(sizes):
    mean = sum(sizes) / len(sizes)
    expected = sum(abs(a - b) for a in sizes for b in sizes) / (2 * len(sizes) ** 2 * mean)
    assert math.isclose(gini(sizes), expected, abs_tol=1e-9)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=8).filter(any))
def test_heterogeneity_is_between_zero_and_one(counts):
    assert -1e-12 <= heterogeneity(counts) <= 1


def test_texts_are_counted_at_any_depth():
    row = {"messages": [{"role": "user", "content": "héllo"}], "tokens": ["a", "bc"], "n": 5, "none": None}
    assert length(row) == 4 + 5 + 3


def test_tags_are_counted_one_by_one():
    rows = [{"tags": ["O", "O", "B"]}, {"tags": ["O"]}]
    assert statistics(Federation.of({"a": {"train": rows}})).clients["a"].labels == {"B": 1, "O": 3}
