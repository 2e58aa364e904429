"""The algebra of low-rank pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.blocks.lora import LoraPair, pairs, rank_view, unpaired
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
