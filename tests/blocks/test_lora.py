"""The algebra of low-rank pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.blocks.lora import LoraPair, digest, energy, pairs, rank_view, unpaired
from fedllm.core.errors import FedLLMError


def pair(rank: int, inside: int = 6, outside: int = 5, seed: int = 0) -> LoraPair:
    draw = torch.Generator().manual_seed(seed)
    return LoraPair(torch.randn(rank, inside, generator=draw), torch.randn(outside, rank, generator=draw))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 4), st.floats(0.1, 16), st.integers(0, 99))
def test_algebra(rank: int, more: int, scale: float, seed: int) -> None:
    p = pair(rank, seed=seed)
    assert torch.equal(p.pad(rank + more).truncate(rank).a, p.a)
    assert torch.allclose(p.pad(rank + more).product(), p.product(), atol=1e-5)
    assert torch.allclose(p.norm(), p.product().norm(), atol=1e-3, rtol=1e-4)
    a, b = p.factors(scale)
    assert torch.allclose(scale * b @ a, p.product(), atol=1e-4, rtol=1e-4)
    again = LoraPair.of(a, b, scale)
    assert torch.allclose(again.a, p.a, atol=1e-5) and torch.allclose(again.b, p.b, atol=1e-5)


def test_svd_is_exact_at_full_rank_best_below_and_deterministic() -> None:
    product = pair(3).product()
    assert torch.allclose(LoraPair.from_product(product, 3).product(), product, atol=1e-5)
    assert torch.allclose(LoraPair.from_product(product, 5).product(), product, atol=1e-5)
    left = (product - LoraPair.from_product(product, 2).product()).norm()
    assert torch.isclose(left, torch.linalg.svdvals(product)[2], atol=1e-5)
    first, again = LoraPair.from_product(product, 2), LoraPair.from_product(product.clone(), 2)
    assert torch.equal(first.a, again.a) and torch.equal(first.b, again.b)


def test_pairs_view_and_bad_shapes() -> None:
    p = pair(4)
    tensors = {"x.lora_A": p.a, "x.lora_B": p.b}
    assert torch.allclose(unpaired(pairs(tensors, 2.0), 2.0)["x.lora_A"], p.a, atol=1e-6)
    cut = rank_view(tensors, 2).extract(tensors)
    assert cut["x.lora_A"].shape == (2, 6) and cut["x.lora_B"].shape == (5, 2)
    with pytest.raises(FedLLMError, match="do not match"):
        LoraPair(p.a, p.a)
    with pytest.raises(FedLLMError, match="cannot be padded"):
        p.pad(2)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.sampled_from(["both", "out"]), st.integers(0, 99))
def test_thin_and_dense_svd_agree(rank: int, kept: int, split: Any, seed: int) -> None:
    """Of the product and of the factors alone; the tail of the singular values is what a cut loses."""
    p = pair(rank, inside=7, outside=6, seed=seed)
    thin, dense = p.to_rank(kept, split), LoraPair.from_product(p.product(), kept, split)
    assert torch.allclose(thin.product(), dense.product(), atol=1e-4)
    values = torch.linalg.svdvals(p.product())
    assert torch.isclose((p.product() - thin.product()).square().sum(), values[kept:].square().sum(), atol=1e-3)
    part, whole = energy(p.svd()[1], kept)
    assert whole == pytest.approx(float(values.square().sum()), rel=1e-4)
    assert part == pytest.approx(float(values[:kept].square().sum()), rel=1e-4)


def test_slices_are_nested_and_the_split_says_where_singular_values_go() -> None:
    p = pair(5, inside=8, outside=7)
    eight, four = p.to_rank(5, "out"), p.to_rank(3, "out")
    assert torch.equal(eight.truncate(3).a, four.a) and torch.equal(eight.truncate(3).b, four.b)
    assert torch.allclose(eight.a @ eight.a.T, torch.eye(5), atol=1e-5)
    assert torch.allclose(eight.b.norm(dim=0), torch.linalg.svdvals(p.product())[:5], atol=1e-4)
    both = p.to_rank(5, "both")
    assert torch.allclose(both.a.norm(dim=1), both.b.norm(dim=0), atol=1e-5)


def test_directions_without_anything_begin_afresh() -> None:
    p, fresh = pair(2), pair(4, seed=1).a
    cut = p.to_rank(4, "out", fresh)
    assert torch.equal(cut.a[2:], fresh[2:]) and not cut.b[:, 2:].any()
    assert torch.allclose(cut.product(), p.product(), atol=1e-5)
    nothing = LoraPair(p.a, torch.zeros_like(p.b)).to_rank(4, "both", fresh)
    assert torch.equal(nothing.a, fresh) and not nothing.b.any()


def test_a_digest_sees_names_shapes_and_bits() -> None:
    p = pair(2)
    one = digest({"a": p.a, "b": p.b})
    assert one == digest({"b": p.b.clone(), "a": p.a.clone()}) and len(one) == 16
    moved = p.a.clone()
    moved[0, 0] = torch.nextafter(moved[0, 0], torch.tensor(9.0))
    for other in ({"a": moved, "b": p.b}, {"c": p.a, "b": p.b}, {"a": p.a.reshape(6, 2), "b": p.b}):
        assert digest(other) != one
