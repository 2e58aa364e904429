"""Sparse entries beside LoRA: what they add, per client, on layers of either orientation; the base stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.blocks.sparse import dense, places, shapes
from fedllm.models.adapters.attach import Adapted
from fedllm.models.adapters.grouped import _SparseProduct
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings

FAMILIES = ["llama", "gpt2"]


@pytest.fixture(scope="module", params=FAMILIES)
def adapted(request: Any) -> Adapted:
    """GPT-2's layers keep their weights as [in, out]."""
    loaded = load_model(ModelSettings(name=f"toy:{request.param}", device="cpu"), "causal-lm")
    return Adapted(loaded, AdapterSettings(rank=3, alpha=6.0, targets="attention"), seed=0)


IDS = {"input_ids": torch.arange(12).view(4, 3) + 5, "attention_mask": torch.ones(4, 3, dtype=torch.long)}


def drawn(adapted: Adapted, clients: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    first = adapted.initial()
    index = places(shapes(first), 3, 0.2)
    stream = torch.Generator().manual_seed(0)
    values = {
        name.removesuffix("_at"): torch.randn(clients, len(at), generator=stream) * 0.1 for name, at in index.items()
    }
    spread = {name: tensor.expand(clients, *tensor.shape) for name, tensor in {**first, **index}.items()}
    return values, spread


def test_a_sparse_change_is_the_change_of_the_weight(adapted: Adapted) -> None:
    """The same outputs as a model whose weights hold scale * S; two clients in one pass, each with its own."""
    values, rest = drawn(adapted, 2)
    with torch.no_grad(), adapted.using({**rest, **values}):
        found = adapted.call(IDS).logits
    whole, layers = dict(adapted.model.named_modules()), shapes(adapted.initial())
    for client in range(2):
        before = {name: whole[name].weight.detach().clone() for name in layers}
        for name, shape in layers.items():
            change = 2.0 * dense(values[f"{name}.sparse"][client], rest[f"{name}.sparse_at"][client], shape)
            turned = type(whole[name]).__name__ == "Conv1D"
            whole[name].weight.data = before[name] + (change.T if turned else change)
        with torch.no_grad():
            alone = adapted.call({name: part[2 * client : 2 * client + 2] for name, part in IDS.items()}).logits
        for name, weight in before.items():
            whole[name].weight.data = weight
        assert torch.allclose(found[2 * client : 2 * client + 2], alone, atol=1e-4)


def test_gradients_are_those_of_a_dense_weight(adapted: Adapted) -> None:
    values, rest = drawn(adapted, 2)
    name, (outside, inside) = next(iter(shapes(adapted.initial()).items()))
    leaf = values[f"{name}.sparse"].double().requires_grad_()
    x = torch.randn(2, 5, inside, dtype=torch.double, generator=torch.Generator().manual_seed(1), requires_grad=True)
    at = rest[f"{name}.sparse_at"]
    assert torch.autograd.gradcheck(lambda a, v: _SparseProduct.apply(a, v, at, outside), (x, leaf), fast_mode=True)


def test_without_values_nothing_is_added_and_the_base_is_untouched(adapted: Adapted) -> None:
    weights = {name: tensor.clone() for name, tensor in adapted.model.named_parameters()}
    values, rest = drawn(adapted, 1)
    plain = {name: tensor for name, tensor in rest.items() if not name.endswith("sparse_at")}
    with torch.no_grad():
        base = adapted.call(IDS).logits
        with adapted.using(plain):
            lora = adapted.call(IDS).logits
        with adapted.using({**rest, **{name: torch.zeros_like(tensor) for name, tensor in values.items()}}):
            zero = adapted.call(IDS).logits
    assert torch.equal(base, lora) and torch.equal(base, zero)
    assert all(torch.equal(weights[name], tensor) for name, tensor in adapted.model.named_parameters())
