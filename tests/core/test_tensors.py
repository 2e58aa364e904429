"""Tensors - the little arithmetic on named tensors, in good precision, and never on shapes that do not agree."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import UploadRejected
from fedllm.core.tensors import (
    add,
    count,
    finite,
    in_one_piece,
    norm,
    over,
    same_names,
    same_shapes,
    size_in_bytes,
    squared_distance,
    subtract,
    zeros,
)


def tree(**values: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=6, max_size=6), st.floats(-4, 4, width=32))
@settings(max_examples=80, deadline=None)
def test_add_and_subtract_against_numpy(values: list[float], scale: float) -> None:
    a, b = torch.tensor(values[:3]), torch.tensor(values[3:])
    found = add({"w": a}, {"w": b}, scale)["w"]
    assert numpy.allclose(found.numpy(), a.double().numpy() + scale * b.double().numpy(), rtol=1e-5, atol=1e-3)
    assert torch.equal(subtract({"w": a}, {"w": b})["w"], a - b)


def test_add_computes_in_single_precision_and_keeps_the_type() -> None:
    """1 + 2^-9 - 1 in bfloat16 would be 0 before it is scaled."""
    left = {"w": torch.ones(1, dtype=torch.bfloat16)}
    right = {"w": torch.tensor([2.0**-9])}
    assert add(left, right, 4.0)["w"].dtype == torch.bfloat16
    assert add(left, right, 4.0)["w"].item() == 1 + 2**-7
    assert subtract(left, {"w": torch.tensor([2.0**-9])})["w"].item() == 1 - 2**-9
    assert add({"w": torch.ones(1).double()}, right)["w"].dtype == torch.float64


def test_integers_and_bools_are_copied_never_added() -> None:
    counters = {"n": torch.tensor([5]), "b": torch.tensor([True, False])}
    after = {"n": torch.tensor([7]), "b": torch.tensor([False, False])}
    change = subtract(after, counters)
    assert change["n"].tolist() == [7]
    found = add(counters, change, 0.5)
    assert found["n"].tolist() == [7]
    assert found["n"].dtype == torch.int64
    assert found["b"].tolist() == [False, False]
    change["n"].zero_()
    assert after["n"].tolist() == [7], "a copy, not the client's own tensor"


def test_nothing_is_changed_in_place() -> None:
    left, right = tree(w=[1.0, 2.0]), tree(w=[3.0, 4.0])
    add(left, right), subtract(left, right), zeros(left), over(lambda a, b: a * b, left, right)
    assert left["w"].tolist() == [1.0, 2.0]
    assert right["w"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    "right", [tree(w=[1.0]), tree(w=[1.0, 2.0, 3.0]), {"w": torch.zeros(1, 2)}, {"w": torch.zeros(())}]
)
def test_shapes_that_would_broadcast_are_refused(right: dict[str, torch.Tensor]) -> None:
    for function in (add, subtract):
        with pytest.raises(UploadRejected, match=r"has 'w' in shape .* Expected \(2,\)"):
            function(tree(w=[1.0, 2.0]), right)


def test_other_names_are_refused_with_the_nearest() -> None:
    left, right = tree(weight=[1.0], bias=[1.0]), tree(weigth=[1.0], bias=[1.0])
    for function in (add, subtract, lambda a, b: over(lambda x, y: x, a, b)):
        with pytest.raises(UploadRejected, match=r"\(1 missing, 1 unexpected\)"):
            function(left, right)
    with pytest.raises(UploadRejected, match=r"X is missing 'weight'.*Expected 2 tensors\. Did you mean 'weight'\?"):
        same_names(right, left, "X")
    with pytest.raises(UploadRejected, match=r"X has an unexpected tensor 'b'"):
        same_names(tree(a=[1.0], b=[1.0]), tree(a=[1.0]), "X")
    same_names(tree(a=[1.0], b=[2.0]), tree(b=[1.0, 2.0], a=[1.0]), "X")
    same_shapes(tree(a=[1.0], b=[2.0]), tree(b=[1.0], a=[1.0]), "X")
    with pytest.raises(UploadRejected, match=r"X has 'a' in shape \(1,\)\. Expected \(2,\)"):
        same_shapes(tree(a=[1.0]), tree(a=[1.0, 2.0]), "X")


def test_zeros_are_single_precision_or_better() -> None:
    like = {"h": torch.ones(2).half(), "f": torch.ones(2), "d": torch.ones(2).double(), "n": torch.ones(2).long()}
    assert {n: t.dtype for n, t in zeros(like).items()} == {
        "h": torch.float32,
        "f": torch.float32,
        "d": torch.float64,
        "n": torch.float32,
    }
    assert not any(t.any() for t in zeros(like).values())


def test_squared_distance_and_its_gradient() -> None:
    left = {"a": torch.tensor([1.0, 2.0], requires_grad=True), "b": torch.tensor(3.0, requires_grad=True)}
    distance = squared_distance(left, {"a": torch.tensor([0.0, 4.0]), "b": torch.tensor(1.0)})
    assert distance.item() == 1 + 4 + 4
    distance.backward()
    assert left["a"].grad is not None and left["a"].grad.tolist() == [2.0, -4.0]
    assert left["b"].grad is not None and left["b"].grad.item() == 4.0


def test_norm_count_and_size() -> None:
    held = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]]).half(), "n": torch.tensor([100])}
    assert norm(held) == 5.0
    assert norm({}) == 0.0
    assert norm({"a": torch.full((4,), 1e30)}) == pytest.approx(2e30), "no overflow in single precision"
    assert count(held) == 4
    assert size_in_bytes(held) == 8 + 2 + 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str
)
def test_finite_names_the_first_that_is_not(value: float, dtype: torch.dtype) -> None:
    good = {"a": torch.ones(2), "n": torch.tensor([1]), "e": torch.zeros(0), "b": torch.tensor([True])}
    assert finite(good) is None
    assert finite({**good, "x": torch.tensor([0.0, value]).to(dtype), "y": torch.tensor([value])}) == "x"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_a_sum_that_overflows_is_finite_all_the_same(dtype: torch.dtype) -> None:
    largest = torch.full((1000,), torch.finfo(dtype).max).to(dtype)
    assert finite({"a": largest}) is None
    assert finite({"a": torch.full((3,), float("nan")).to(dtype)}) == "a"


def test_infinities_that_cancel_are_found() -> None:
    assert finite({"a": torch.tensor([float("inf"), 1.0, -float("inf")])}) == "a"


def test_neighbours_in_memory_are_one_vector_without_a_copy() -> None:
    whole = torch.arange(24.0)
    tree = [whole[2:8].view(2, 3), whole[8:9].view(()), whole[9:24].view(5, 3)]
    found = in_one_piece(tree)
    assert found is not None and torch.equal(found, whole[2:])
    found.zero_()
    assert not tree[2].any() and whole[:2].tolist() == [0.0, 1.0]
    assert in_one_piece(tree[1:]) is not None and in_one_piece([whole]) is not None


def test_what_is_no_neighbour_is_not_taken_for_one() -> None:
    whole = torch.arange(24.0)
    one, two, three = whole[:6], whole[6:12], whole[12:]
    for apart in (
        [],
        [two, one],
        [one, three],
        [one, one],
        [one, whole[5:12]],
        [one.view(2, 3).t(), two],
        [one, two.view(torch.int32)],
        [one, two.clone()],
        [torch.ones(2), torch.ones(2)],
        [torch.empty(0)],
        [torch.ones(3).expand(2, 3)],
    ):
        assert in_one_piece(apart) is None
    assert in_one_piece([torch.empty(4, device="meta"), torch.empty(4, device="meta")]) is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_one_piece_is_what_concatenation_would_give(sizes: list[int], draw: random.Random) -> None:
    pieces = list(torch.arange(sum(sizes)).split(sizes))
    chosen = [draw.choice(pieces) for _ in range(draw.randint(1, 4))]
    start = draw.randrange(len(pieces))
    for some in (chosen, pieces[start : draw.randint(start + 1, len(pieces))]):
        found = in_one_piece(some)
        assert found is None or torch.equal(found, torch.cat(some))
    assert in_one_piece(pieces) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_finite_names_the_first_in_one_piece_too(value: float) -> None:
    whole = torch.ones(9)
    tree = dict(zip("abc", whole.split(3), strict=True))
    assert finite(tree) is None
    whole[4] = whole[8] = value
    assert finite(tree) == "b"
    whole.fill_(torch.finfo(torch.float32).max)
    assert finite(tree) is None, "the sum overflows, no entry does"
