"""Layers - the score of a layer's hidden states, distinct rows, the choice."""

from __future__ import annotations

import numpy
import pytest
import torch

from fedllm.blocks.layers import best_layers, distinct, spread_score
from fedllm.blocks.prompts import depth, layer_of, of_layers
from fedllm.core.errors import ConfigError


@pytest.mark.parametrize("b", [2, 5, 8])
def test_orthogonal_and_identical_examples(b: int) -> None:
    orthogonal = torch.eye(b, 12).reshape(b, 3, 4) * 7
    assert spread_score(orthogonal) == pytest.approx(b, abs=b * 2e-5)
    identical = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).expand(b, 3, 4)
    assert spread_score(identical) == pytest.approx((b - 1) * 1e5, rel=1e-3)


def test_scale_and_padding_do_not_count() -> None:
    states = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([states * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None], torch.zeros(4, 2, 5)], 1)
    assert spread_score(padded) == pytest.approx(spread_score(states), rel=1e-4)
    silent = states.clone()
    silent[0] = 0
    assert numpy.isfinite(spread_score(silent))


def test_rows_are_distinct() -> None:
    rows = [{"a": n % 3, "b": [n % 3]} for n in range(9)]
    found = distinct(rows, 8, numpy.random.default_rng(0))
    assert sorted(row["a"] for row in found) == [0, 1, 2]
    assert len(distinct(rows, 2, numpy.random.default_rng(0))) == 2
    assert distinct([], 2, numpy.random.default_rng(0)) == []
    assert len(distinct([{"x": torch.zeros(2)}, {"x": torch.ones(2)}], 8, numpy.random.default_rng(0))) == 2


def test_the_best_layers() -> None:
    scores = [1.0, 4.0, 2.0, 4.0]
    assert best_layers(scores, 0.5) == [1, 3]
    assert best_layers(scores, 0.26) == [1, 3] and best_layers(scores, 0.25) == [1]
    assert best_layers(scores, 0.0) == [1], "at least one"
    assert best_layers(scores, 1.0) == [0, 1, 2, 3] == best_layers(scores, 2.0)
    assert best_layers([0.0] * 3, 0.6) == [0, 1]
    assert len(best_layers([1.0] * 10, 0.3)) == 3, "0.3 * 10 is 3.0000000000000004 at worst"


def test_prefixes_by_layer() -> None:
    tensors = {f"prefix.{layer}.{part}": torch.zeros(1) for layer in range(12) for part in ("key", "value")}
    tensors["head.weight"] = torch.zeros(1)
    assert layer_of("prefix.11.key") == 11 and layer_of("prefix.1.weight") is None and layer_of("head.weight") is None
    assert depth(tensors) == 12
    assert list(of_layers(tensors, [1])) == ["prefix.1.key", "prefix.1.value", "head.weight"]
    with pytest.raises(ConfigError, match=r"no prefix among the trainable tensors"):
        depth(["q.lora_A"])
