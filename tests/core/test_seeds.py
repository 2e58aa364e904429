"""Seeds - the same stream everywhere and for ever, and another one for every other name."""

from __future__ import annotations

import random

import numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.seeds import Derived, derive, numpy_stream, python_stream, torch_stream

PINNED = {
    "derive 0": 3456079177858693020,
    "derive batches": 2998719901226379741,
    "derive -3 x": 6165273520027481700,
    "numpy": [482, 233, 705, 279],
    "torch": [141, 117, 825, 654],
    "python": [950, 886, 161, 985],
}


def test_pinned_values() -> None:
    """Changing one of these changes every run that was ever made."""
    ordered = python_stream(7, "order")
    assert derive(0) == PINNED["derive 0"]
    assert derive(0, "batches", "a", 1) == PINNED["derive batches"]
    assert derive(-3, "x") == PINNED["derive -3 x"]
    assert numpy_stream(7, "cohort", 3).integers(0, 1000, 4).tolist() == PINNED["numpy"]
    assert torch_stream(7, "init").initial_seed() == derive(7, "init")
    assert torch.randint(0, 1000, (4,), generator=torch_stream(7, "init")).tolist() == PINNED["torch"]
    assert [ordered.randrange(1000) for _ in range(4)] == PINNED["python"]


def test_seeds_are_63_bit() -> None:
    seeds = [derive(n, "x") for n in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert len(set(seeds)) == len(seeds)


names = st.lists(st.integers(-5, 200) | st.text(st.characters(blacklist_categories=("Cs",)), max_size=4), max_size=4)


@given(st.integers(-10, 10), names, st.integers(-10, 10), names)
@settings(max_examples=400, deadline=None)
def test_different_names_different_seeds(seed: int, left: list[str | int], other: int, right: list[str | int]) -> None:
    same = seed == other and [(type(n), n) for n in left] == [(type(n), n) for n in right]
    assert (derive(seed, *left) == derive(other, *right)) == same


def test_names_do_not_run_into_each_other() -> None:
    assert len({derive(0, *n) for n in [("a", "b"), ("ab",), ("a", "", "b"), ("a\x1fstr:b",), ("a\x1f", "b")]}) == 5
    assert derive(0, 1) != derive(0, "1")
    assert derive(1, "1") != derive(11)


def test_a_numpy_integer_is_the_int_it_equals() -> None:
    for kind in (numpy.int64, numpy.int32, numpy.uint8):
        assert derive(0, "round", kind(3)) == derive(0, "round", 3)
    assert derive(numpy.int64(4), "x") == derive(4, "x")
    assert derive(0, numpy.str_("a")) == derive(0, "a")


def test_streams_do_not_touch_the_global_generators() -> None:
    def state() -> tuple[object, ...]:
        return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]

    before = state()
    numpy_stream(1, "a").normal(size=3)
    torch.randn(3, generator=torch_stream(1, "a"))
    python_stream(1, "a").random()
    assert state() == before


def test_a_stream_can_be_had_again() -> None:
    assert numpy_stream(1, "a").normal() == numpy_stream(1, "a").normal()
    assert numpy_stream(1, "a").normal() != numpy_stream(2, "a").normal()
    assert torch.equal(torch.rand(3, generator=torch_stream(1, "a")), torch.rand(3, generator=torch_stream(1, "a")))


def test_seeds_that_are_derived_late_are_those_derived_at_once() -> None:
    names = [(7, "dropout", f"c{k}", 1) for k in range(4)]
    late, at_once = Derived(names), [derive(*name) for name in names]
    assert list(late) == at_once and list(late[1:3]) == at_once[1:3] and len(late) == 4 and late[-1] == at_once[-1]
