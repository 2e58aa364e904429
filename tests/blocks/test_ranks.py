"""Reducers over pairs of different ranks, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.blocks.lora import LoraPair, pairs
from fedllm.blocks.ranks import NormMean, ProductMean, factors, total_norm, widened
from fedllm.core.errors import UploadRejected
from fedllm.core.message import Dense, Owned, Upload
from fedllm.core.reducer import Reduction
from fedllm.core.view import View

OUT, IN, MOST = 5, 6, 8
LIKE = {"q.lora_A": torch.zeros(MOST, IN), "q.lora_B": torch.zeros(OUT, MOST), "head": torch.zeros(3)}


def client(rank: int, seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(*shape, generator=draw) for shape in ((rank, IN), (OUT, rank), (3,))]
    return {"q.lora_A": drawn[0], "q.lora_B": scale * drawn[1], "head": drawn[2]}


def reduced(reducer: Any, sent: dict[str, tuple[dict[str, torch.Tensor], float]]) -> Any:
    reduction = Reduction(reducer, {"update": LIKE})
    for name, (tensors, weight) in sent.items():
        reduction.add(name, Upload(factors(tensors), weight=weight))
    return reduction.result(len(sent))


SENT = {"a": (client(2, 0), 1.0), "b": (client(4, 1), 3.0), "c": (client(8, 2), 4.0)}


def test_the_mean_of_products_is_one_pair_of_the_ranks_together() -> None:
    found = reduced(ProductMean(), SENT).params
    pair = pairs(found)["q"]
    assert pair.rank == 14
    wanted = sum(w / 8 * pairs(t)["q"].product() for t, w in SENT.values())
    assert torch.allclose(pair.product(), wanted, atol=1e-5)
    assert torch.allclose(found["head"], sum(w / 8 * t["head"] for t, w in SENT.values()), atol=1e-6)
    uniform = pairs(reduced(ProductMean("uniform"), SENT).params)["q"].product()
    assert torch.allclose(uniform, sum(pairs(t)["q"].product() for t, _ in SENT.values()) / 3, atol=1e-5)


@pytest.mark.parametrize("reducer", [ProductMean(), NormMean()])
def test_the_order_of_arrival_does_not_show(reducer: Any) -> None:
    one, two = (reduced(reducer, dict(pairs)) for pairs in (SENT.items(), reversed(SENT.items())))
    for part in one.parts:
        left, right = (found.parts[part].to_wire()[0] for found in (one, two))
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_who_lacks_a_layer_is_left_out_of_its_weights() -> None:
    lacking = {"head": torch.ones(3)}
    reduction = Reduction(ProductMean(), {"update": LIKE})
    reduction.add("a", Upload(factors(client(2, 0)), weight=1.0))
    reduction.add("b", Upload(Owned(lacking, View.whole(lacking)), weight=1.0))
    found = reduction.result(2).params
    assert torch.allclose(pairs(found)["q"].product(), pairs(client(2, 0))["q"].product(), atol=1e-6)
    assert torch.allclose(found["head"], (client(2, 0)["head"] + 1) / 2)


def test_weights_are_norms_and_sum_to_one() -> None:
    norms = torch.tensor([total_norm(t) for t, _ in SENT.values()], dtype=torch.float64)
    for norm, (tensors, _) in zip(norms.tolist(), SENT.values(), strict=True):
        assert norm == pytest.approx(float((tensors["q.lora_B"] @ tensors["q.lora_A"]).norm()), rel=1e-5)
    shares = NormMean().shares(norms, torch.ones(3, dtype=torch.float64))
    assert torch.allclose(shares, norms / norms.sum()) and float(shares.sum()) == pytest.approx(1)
    found = reduced(NormMean(), SENT).parts["update"]
    wanted = torch.zeros(MOST, IN, dtype=torch.float64)
    for share, (tensors, _) in zip(shares.tolist(), SENT.values(), strict=True):
        wanted[: tensors["q.lora_A"].shape[0]] += share * tensors["q.lora_A"]
    assert torch.allclose(found.sums["q.lora_A"], wanted, atol=1e-6)


def test_equal_ranks_and_norms_are_the_plain_mean() -> None:
    one = client(4, 0)
    two = {"q.lora_A": -one["q.lora_A"], "q.lora_B": one["q.lora_B"], "head": one["head"] + 2}
    found = reduced(NormMean(), {"a": (one, 1.0), "b": (two, 9.0)}).parts["update"]
    assert torch.allclose(found.sums["q.lora_A"].float(), torch.zeros(4, IN), atol=1e-6)
    assert torch.allclose(found.sums["q.lora_B"].float(), one["q.lora_B"], atol=1e-6)
    assert torch.allclose(found.sums["head"].float(), one["head"] + 1, atol=1e-6)


def test_nothing_learnt_falls_back_to_examples_and_a_zero_weighs_nothing() -> None:
    zero = client(4, 0, scale=0.0)
    found = reduced(NormMean(), {"a": (zero, 1.0), "b": (client(4, 1, scale=0.0), 3.0)}).parts["update"]
    assert torch.allclose(found.sums["head"].float(), 0.25 * zero["head"] + 0.75 * client(4, 1)["head"], atol=1e-6)
    found = reduced(NormMean(), {"a": (zero, 100.0), "b": (client(4, 1), 1.0)}).parts["update"]
    assert torch.allclose(found.sums["q.lora_A"].float(), client(4, 1)["q.lora_A"], atol=1e-6)


def test_a_cap_holds_a_client_that_scales_itself_up() -> None:
    norms = torch.tensor([1.0, 1.0, 100.0], dtype=torch.float64)
    plain = torch.ones(3, dtype=torch.float64)
    assert float(NormMean().shares(norms, plain)[2]) > 0.98
    assert torch.allclose(NormMean(cap=3.0).shares(norms, plain), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64))


def _without(tensors: dict[str, torch.Tensor], name: str) -> Owned:
    left = {n: t for n, t in tensors.items() if n != name}
    return Owned(left, View.leading({n: tuple(t.shape) for n, t in left.items()}))


def _moved(tensors: dict[str, torch.Tensor]) -> Owned:
    part = factors(tensors)
    return Owned(part.tensors, View({**part.view.regions, "q.lora_A": (slice(1, 3),)}))


def _unequal(tensors: dict[str, torch.Tensor]) -> Owned:
    cut = {**tensors, "q.lora_B": tensors["q.lora_B"][:, :1]}
    return Owned(cut, View.leading({n: tuple(t.shape) for n, t in cut.items()}))


@pytest.mark.parametrize("reducer", [ProductMean(), NormMean()])
@pytest.mark.parametrize(
    ("part", "why"),
    [
        (Dense(client(2, 0)), "dense part|shape"),
        (_without(client(2, 0), "q.lora_B"), "'q.lora_A' and not 'q.lora_B'"),
        (_without(client(2, 0), "q.lora_A"), "'q.lora_B' and not 'q.lora_A'"),
        (_moved(client(2, 0)), "not the first rows and columns"),
        (_unequal(client(2, 0)), "do not match"),
        (factors(client(9, 0)), "reaches"),
        (factors({**client(2, 0), "q.lora_B": torch.full((OUT, 2), 1e30)}), "not finite"),
    ],
)
def test_a_wrong_upload_is_rejected_and_the_rest_counts(reducer: Any, part: Any, why: str) -> None:
    reduction = Reduction(reducer, {"update": LIKE})
    with pytest.raises(UploadRejected, match=why):
        reduction.add("bad", Upload(part, weight=5.0))
    reduction.add("good", Upload(factors(client(2, 1)), weight=1.0))
    assert reduction.result(2).clients == 1


def test_narrow_pairs_are_widened_with_zeros() -> None:
    narrow = {"q.lora_A": torch.ones(2, IN - 1), "q.lora_B": torch.ones(OUT - 2, 2)}
    pair = widened(narrow, LIKE)["q"]
    assert isinstance(pair, LoraPair) and pair.product().shape == (OUT, IN)
    assert not pair.product()[:, -1].any() and not pair.product()[-2:].any()


def test_neither_is_linear() -> None:
    assert not ProductMean().linear and not NormMean().linear
