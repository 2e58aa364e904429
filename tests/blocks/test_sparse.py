"""Entries that both sides draw from a seed."""

from __future__ import annotations

import pytest
import torch

from fedllm.blocks.lora import digest
from fedllm.blocks.sparse import agreed, bridge, dense, places, shapes, sparse_count, sparse_index
from fedllm.core.errors import ConfigError


def test_a_seed_gives_the_same_places_everywhere() -> None:
    first = sparse_index(7, "q", (12, 20), 0.1)
    sparse_index.cache_clear()
    again = sparse_index(7, "q", (12, 20), 0.1)
    assert torch.equal(first, again) and first is not again
    assert len(first) == sparse_count((12, 20), 0.1) == 24
    assert torch.equal(first, first.unique()) and int(first[0]) >= 0 and int(first[-1]) < 240
    for other in (sparse_index(8, "q", (12, 20), 0.1), sparse_index(7, "v", (12, 20), 0.1)):
        assert not torch.equal(first, other)


def test_density_one_is_everything_and_a_small_one_is_at_least_one() -> None:
    assert torch.equal(sparse_index(0, "q", (3, 4), 1.0), torch.arange(12))
    assert len(sparse_index(0, "q", (3, 4), 1e-9)) == 1


def test_dense_puts_values_at_their_places() -> None:
    found = dense(torch.tensor([1.0, 2.0]), torch.tensor([1, 5]), (2, 3))
    assert torch.equal(found, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]]))


def test_sides_that_differ_are_told() -> None:
    layers = {"q": (4, 5)}
    theirs = digest(places(layers, 1, 0.5))
    assert agreed(layers, 1, 0.5, theirs, "c0").keys() == {"q.sparse_at"}
    with pytest.raises(ConfigError, match="'c0' drew other entries"):
        agreed(layers, 2, 0.5, theirs, "c0")


def test_the_bridge_at_full_rank_is_exact_and_keeps_the_head() -> None:
    first = {"q.lora_A": torch.randn(4, 6), "q.lora_B": torch.zeros(4, 4), "head": torch.ones(2)}
    index = places(shapes(first), 0, 1.0)
    values = {"q.sparse": torch.randn(24)}
    found, share = bridge(first, values, index, "both")
    assert share == pytest.approx(1.0) and torch.equal(found["head"], first["head"])
    change = dense(values["q.sparse"], index["q.sparse_at"], (4, 6))
    assert torch.allclose(found["q.lora_B"] @ found["q.lora_A"], change, atol=1e-5)
    nothing, share = bridge(first, {"q.sparse": torch.zeros(24)}, index, "both")
    assert share == 1.0 and all(torch.equal(nothing[name], first[name]) for name in first)
