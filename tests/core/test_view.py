"""View - extract, scatter_add and mask against the slow, obvious way, entry by entry."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import ConfigError, UploadRejected
from fedllm.core.message import Message, Owned
from fedllm.core.tensors import Tensors
from fedllm.core.view import View
from fedllm.core.wire import decode, encode

SHAPES = {"w": (4, 5, 2), "b": (6,), "s": ()}


def tree(stream: numpy.random.Generator) -> Tensors:
    return {n: torch.tensor(stream.normal(size=shape), dtype=torch.float32) for n, shape in SHAPES.items()}


def random_view(stream: numpy.random.Generator, scaled: bool = True) -> View:
    def entry(size: int) -> Any:
        kind = stream.integers(0, 4)
        if kind == 0:
            start, stop = sorted(stream.integers(0, size + 1, 2).tolist())
            return slice(start, stop)
        if kind == 1:
            return slice(None, int(stream.integers(0, size + 1)), 1)
        return torch.tensor(stream.permutation(size)[: stream.integers(0, size + 1)])

    names = [n for n in SHAPES if stream.random() < 0.8]
    regions = {n: tuple(entry(size) for size in SHAPES[n][: stream.integers(0, len(SHAPES[n]) + 1)]) for n in names}
    scales = {n: float(stream.choice([-1.0, 0.5, 3.0])) for n in names if scaled and stream.random() < 0.5}
    return View(regions, scales)


def places(view: View, name: str) -> tuple[list[int], list[tuple[int, ...]]]:
    """The shape of the viewed values of `name` and the place of each, in their order."""
    axes = []
    for d, size in enumerate(SHAPES[name]):
        entry = view.regions[name][d] if d < len(view.regions[name]) else slice(0, size)
        axes.append(list(range(entry.start or 0, entry.stop)) if isinstance(entry, slice) else entry.tolist())
    return [len(axis) for axis in axes], list(itertools.product(*axes))


@given(st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_extract_scatter_add_and_mask_against_brute_force(seed: int) -> None:
    stream = numpy.random.default_rng(seed)
    whole, target, view, weight = tree(stream), tree(stream), random_view(stream), float(stream.normal())
    before = {n: t.clone() for n, t in target.items()}
    values, masks = view.extract(whole), view.mask(whole)
    assert values.keys() == view.regions.keys()
    assert masks.keys() == whole.keys()
    view.scatter_add(target, values, weight)
    for name in SHAPES:
        expected, mask = before[name].numpy().astype(numpy.float64), numpy.zeros(SHAPES[name])
        if name in view.regions:
            shape, where = places(view, name)
            scale = view.scales.get(name, 1.0)
            assert list(values[name].shape) == shape
            slow = [whole[name][place].item() * scale for place in where]
            assert numpy.allclose(values[name].flatten().numpy(), slow, rtol=1e-6)
            for place in where:
                expected[place] += weight * whole[name][place].item()
                mask[place] = 1
        assert numpy.allclose(target[name].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert numpy.array_equal(masks[name].numpy(), mask)


@given(st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_what_is_scattered_is_extracted_again(seed: int) -> None:
    """extract(scatter_add(0, x)) = x, to the last bit where scales are powers of two."""
    stream = numpy.random.default_rng(seed)
    view = random_view(stream, scaled=False)
    view = View(view.regions, {n: float(stream.choice([0.25, 1.0, 8.0])) for n in view.regions})
    values = {
        n: torch.tensor(stream.normal(size=v.shape), dtype=torch.float32) for n, v in view.extract(tree(stream)).items()
    }
    target = {n: torch.zeros(shape) for n, shape in SHAPES.items()}
    view.scatter_add(target, values)
    again = view.extract(target)
    assert all(torch.equal(again[n], values[n]) for n in values)


@given(st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_the_wire_keeps_a_view(seed: int) -> None:
    stream = numpy.random.default_rng(seed)
    view, whole = random_view(stream), tree(stream)
    tensors, facts = view.to_wire()
    for back in (View.from_wire(tensors, facts), sent(view, whole)):
        assert back.scales == view.scales
        assert all(torch.equal(back.extract(whole)[n], v) for n, v in view.extract(whole).items())
        assert back.regions.keys() == view.regions.keys()


def sent(view: View, whole: Tensors) -> View:
    part = decode(encode(Message({"p": Owned(view.extract(whole), view)}))).parts["p"]
    assert isinstance(part, Owned)
    return part.view


def test_truncating_what_was_padded_gives_it_back() -> None:
    small = {"A": torch.arange(6.0).view(2, 3), "B": torch.arange(8.0).view(4, 2)}
    view = View.leading({n: tuple(t.shape) for n, t in small.items()})
    padded = {"A": torch.zeros(8, 3), "B": torch.zeros(4, 8)}
    view.scatter_add(padded, small)
    assert all(torch.equal(view.extract(padded)[n], small[n]) for n in small)
    assert padded["A"].sum() == small["A"].sum()
    assert not padded["A"][2:].any() and not padded["B"][:, 2:].any()


def test_whole_takes_everything_and_copies_it() -> None:
    whole = tree(numpy.random.default_rng(0))
    view = View.whole(whole)
    found = view.extract(whole)
    assert all(torch.equal(found[n], whole[n]) for n in whole)
    assert all(bool(m.all()) for m in view.mask(whole).values())
    found["b"].zero_()
    assert whole["b"].any()


def test_names_that_are_not_viewed_are_left_alone() -> None:
    target = {"w": torch.ones(2), "other": torch.ones(3)}
    View({"w": (slice(0, 1),)}).scatter_add(target, {"w": torch.ones(1)})
    assert target["w"].tolist() == [2.0, 1.0]
    assert target["other"].tolist() == [1.0] * 3
    assert View({"w": ()}).mask(target)["other"].tolist() == [0.0] * 3
    assert View({}).extract(target) == {}


def test_the_scale_is_applied_and_undone() -> None:
    view = View({"w": ()}, {"w": 4.0})
    assert view.extract({"w": torch.tensor([1.0, 2.0])})["w"].tolist() == [4.0, 8.0]
    target = {"w": torch.zeros(2)}
    view.scatter_add(target, {"w": torch.tensor([4.0, 8.0])}, 0.5)
    assert target["w"].tolist() == [0.5, 1.0]


def test_half_precision_targets_stay_half() -> None:
    target = {"w": torch.ones(3, dtype=torch.bfloat16)}
    View({"w": (torch.tensor([2, 0]),)}).scatter_add(target, {"w": torch.ones(2, dtype=torch.bfloat16)}, 2.0)
    assert target["w"].dtype == torch.bfloat16
    assert target["w"].tolist() == [3.0, 1.0, 3.0]


# -- refusals ---------------------------------------------------------------------------------------------------------

ONE = {"w": torch.zeros(3, 2)}


@pytest.mark.parametrize(
    ("view", "word"),
    [
        (View({"w": (slice(2, 4),)}), r"reaches \(2, 4\) in dimension 0.*shape is \(3, 2\)"),
        (View({"w": (torch.tensor([0, 3]),)}), r"reaches \(0, 4\)"),
        (View({"w": (slice(0, 1), slice(0, 1), slice(0, 1))}), "dimension 2"),
        (View({"w.weight": ()}), r"'w.weight', which does not exist"),
        (View({"ww": ()}), r"Did you mean 'w'\?"),
    ],
)
def test_a_view_that_reaches_outside_is_rejected_everywhere(view: View, word: str) -> None:
    for use in (view.extract, view.mask, lambda t: view.scatter_add(t, {n: torch.zeros(1) for n in view.regions})):
        with pytest.raises(UploadRejected, match=word):
            use(ONE)


@pytest.mark.parametrize(
    "values",
    [
        {"w": torch.ones(1, 2)},
        {"w": torch.ones(2)},
        {"w": torch.ones(2, 1)},
        {},
        {"w": torch.ones(2, 2), "x": torch.ones(1)},
    ],
)
def test_values_that_do_not_fit_are_rejected_and_nothing_is_added(values: Tensors) -> None:
    target = {"a": torch.zeros(2), "w": torch.zeros(3, 2)}
    view = View({"a": (), "w": (slice(1, 3),)})
    with pytest.raises(UploadRejected):
        view.scatter_add(target, {"a": torch.ones(2), **values})
    assert not target["a"].any() and not target["w"].any()


@pytest.mark.parametrize(
    "entry",
    [
        slice(-1, 2),
        slice(0, -1),
        slice(2, 1),
        slice(0, None),
        slice(0, 4, 2),
        slice(4, 0, -1),
        torch.tensor([0, 0]),
        torch.tensor([-1, 1]),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([0.0]),
        torch.tensor([True, False]),
        torch.tensor([[0]]),
        torch.tensor(0),
        3,
        None,
        ...,
        [0, 1],
    ],
    ids=repr,
)
def test_what_is_no_region_is_refused_at_once(entry: Any) -> None:
    """Indices given twice would be written once: half of the values lost without a word."""
    with pytest.raises(ConfigError, match=r"entry in dimension 1 that is not a region\. Allowed"):
        View({"w": (slice(0, 1), entry)})


@pytest.mark.parametrize("scale", [0.0, -0.0, float("nan"), float("inf")])
def test_a_scale_that_cannot_be_undone_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match="scales 'w' by"):
        View({"w": ()}, {"w": scale})
