"""Reducers - means against NumPy, owners against brute force, and uploads that are taken whole or not at all."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core import reducer
from fedllm.core.errors import ConfigError, UploadRejected
from fedllm.core.message import Dense, Message, Owned, Part, Scalars, SeedCoefficients, Table, Texts, Upload
from fedllm.core.reducer import STRETCH, WAITING, Collect, Mean, OwnedMean, OwnedSum, Reducer, Reduction
from fedllm.core.tensors import Tensors, in_one_piece
from fedllm.core.view import View
from fedllm.core.wire import decode, encode


def dense(*values: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values)}


def reduce(reducer: Reducer, parts: list[Part], weights: list[float] | None = None) -> Any:
    running = reducer.begin()
    for number, part in enumerate(parts):
        running.check(part, f"c{number}")
        running.add(part, 1.0 if weights is None else weights[number], f"c{number}")
    return running.result()


# -- mean -------------------------------------------------------------------------------------------------------------

uploads = st.integers(1, 6).flatmap(
    lambda k: st.tuples(
        st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), min_size=k, max_size=k),
        st.lists(st.integers(0, 1000), min_size=k, max_size=k),
    )
)


@given(uploads)
@settings(max_examples=150, deadline=None)
def test_mean_is_the_weighted_mean(given_: tuple[list[list[float]], list[int]]) -> None:
    rows, weights = given_
    parts: list[Part] = [Dense({"w": torch.tensor(row).view(2, 2)}) for row in rows]
    found = reduce(Mean(), parts, [float(w) for w in weights])
    if sum(weights) == 0:
        assert found is None
        return
    expected = numpy.average(numpy.array(rows, dtype=numpy.float64), axis=0, weights=weights).reshape(2, 2)
    assert found.tensors["w"].dtype == torch.float32
    bound = 1e-7 * numpy.abs(numpy.array(rows)).max() + 1e-40
    assert numpy.abs(found.tensors["w"].numpy().astype(numpy.float64) - expected).max() <= bound
    uniform = reduce(Mean("uniform"), parts, [float(w) for w in weights])
    plain = numpy.mean(numpy.array(rows, dtype=numpy.float64), axis=0).reshape(2, 2)
    assert numpy.abs(uniform.tensors["w"].numpy() - plain).max() <= bound


@given(
    st.lists(st.tuples(st.integers(-(2**20), 2**20), st.integers(1, 4096)), min_size=2, max_size=7),
    st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_mean_does_not_depend_on_the_order_of_arrival(pairs: list[tuple[int, int]], rng: Any) -> None:
    """Values on a grid of 2^-10: every float64 sum is exact, so equality to the last bit must hold."""

    def mean(order: list[tuple[int, int]]) -> torch.Tensor:
        return reduce(Mean(), [Dense(dense(v / 1024)) for v, _ in order], [float(w) for _, w in order]).tensors["w"]

    shuffled = list(pairs)
    rng.shuffle(shuffled)
    assert torch.equal(mean(pairs), mean(shuffled))


def test_mean_of_ordinary_updates_does_not_depend_on_the_order_of_arrival() -> None:
    stream = torch.Generator().manual_seed(0)
    parts: list[Part] = [Dense({"w": torch.randn(5000, generator=stream)}) for _ in range(5)]
    weights = [3.0, 141.0, 59.0, 26.0, 535.0]
    first = reduce(Mean(), parts, weights)
    for order in itertools.permutations(range(5)):
        again = reduce(Mean(), [parts[i] for i in order], [weights[i] for i in order])
        assert torch.equal(first.tensors["w"], again.tensors["w"])


def test_the_type_of_the_mean_does_not_depend_on_who_came_first() -> None:
    parts: list[Part] = [Dense({"w": torch.ones(2).half()}), Dense({"w": torch.ones(2).double()})]
    assert reduce(Mean(), parts).tensors["w"].dtype == torch.float64
    assert reduce(Mean(), parts[::-1]).tensors["w"].dtype == torch.float64


def test_half_precision_is_summed_in_better() -> None:
    """2049 ones in bfloat16 added in bfloat16 would stick at 256."""
    running = Mean().begin()
    for _ in range(2049):
        running.add(Dense({"w": torch.ones(1, dtype=torch.bfloat16)}), 1.0, "c")
    running.add(Dense({"w": torch.full((1,), 2050.0 * 3 - 2049, dtype=torch.float32)}), 1.0, "c")
    assert running.result().tensors["w"].item() == 3.0


def test_integer_and_bool_buffers_have_means_too() -> None:
    parts: list[Part] = [
        Dense({"n": torch.tensor([1, 10]), "b": torch.tensor([True, False])}),
        Dense({"n": torch.tensor([2, 10]), "b": torch.tensor([True, True])}),
    ]
    found = reduce(Mean(), parts, [1.0, 3.0]).tensors
    assert found["n"].tolist() == [1.75, 10.0]
    assert found["b"].tolist() == [1.0, 0.75]
    assert found["n"].dtype == found["b"].dtype == torch.float32


def test_weights_that_sum_to_zero_give_nothing() -> None:
    assert reduce(Mean(), [Dense(dense(1.0)), Dense(dense(2.0))], [0.0, 0.0]) is None
    assert reduce(Mean(), []) is None
    assert reduce(Mean("uniform"), [Dense(dense(1.0)), Dense(dense(2.0))], [0.0, 0.0]).tensors["w"].item() == 1.5


def test_a_client_of_weight_zero_counts_for_nothing() -> None:
    parts: list[Part] = [Dense(dense(1.0)), Dense(dense(1e30))]
    assert reduce(Mean(), parts, [5.0, 0.0]).tensors["w"].item() == 1.0


def test_mean_of_scalars_and_seed_coefficients() -> None:
    scalars = reduce(Mean(), [Scalars({"a": 1.0, "b": 0.1}), Scalars({"a": 3.0, "b": 0.1})], [1.0, 3.0])
    assert scalars == Scalars({"a": 2.5, "b": 0.1}), "scalars keep the precision of a float"
    seeds = reduce(
        Mean("uniform"), [SeedCoefficients(torch.tensor([1.0, 0])), SeedCoefficients(torch.tensor([0, 4.0]))]
    )
    assert isinstance(seeds, SeedCoefficients)
    assert seeds.coefficients.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_tables_add_up_and_are_not_weighted_twice(weighting: Any) -> None:
    """Rows are sums over counts[r] items: the mean prototype of class r is rows[r] / counts[r], whatever n_k is."""
    one = Table(torch.tensor([[2.0, 4.0], [0.0, 0.0]]), torch.tensor([2.0, 0.0]))
    two = Table(torch.tensor([[9.0, 0.0], [5.0, 5.0]]), torch.tensor([1.0, 5.0]))
    table = reduce(Mean(weighting), [one, two], [100.0, 3.0])
    assert isinstance(table, Table)
    assert table.rows.tolist() == [[11.0, 4.0], [5.0, 5.0]]
    assert table.counts.tolist() == [3.0, 5.0]


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_a_linear_reducer_is_linear(seed: int, clients: int) -> None:
    """reduce(a + b) = reduce(a) + reduce(b), for every reducer that says so."""
    stream = numpy.random.default_rng(seed)
    weights = [float(w) for w in stream.integers(1, 50, clients)]
    views = [random_view(stream) for _ in range(clients)]

    def values() -> list[Tensors]:
        return [
            {n: torch.tensor(stream.integers(-999, 999, v.shape) / 8.0) for n, v in view.extract(GLOBAL).items()}
            for view in views
        ]

    def whole() -> list[Tensors]:
        return [{n: torch.tensor(stream.integers(-999, 999, t.shape) / 8.0) for n, t in GLOBAL.items()} for _ in views]

    def plus(a: list[Tensors], b: list[Tensors]) -> list[Tensors]:
        return [{n: x[n] + y[n] for n in x} for x, y in zip(a, b, strict=True)]

    a, b = whole(), whole()
    for weighting in ("examples", "uniform"):
        mean = Mean(weighting)  # type: ignore[arg-type]
        assert mean.linear
        both, left, right = (reduce(mean, [Dense(t) for t in x], weights).tensors for x in (plus(a, b), a, b))
        assert all(torch.allclose(both[n], left[n] + right[n], rtol=0, atol=1e-9) for n in both)
    c, d = values(), values()
    assert OwnedMean().linear
    both, left, right = (
        reduce(OwnedMean(), [Owned(t, v) for t, v in zip(x, views, strict=True)], weights) for x in (plus(c, d), c, d)
    )
    if both is None:  # nobody owns anything
        assert left is None and right is None
        return
    assert all(torch.allclose(both.sums[n], left.sums[n] + right.sums[n], rtol=0, atol=1e-9) for n in both.sums)
    assert all(torch.equal(both.weights[n], left.weights[n]) for n in both.weights)


def test_collect_says_that_it_is_not_linear() -> None:
    assert not Collect().linear


# -- owners -----------------------------------------------------------------------------------------------------------

GLOBAL: Tensors = {"w": torch.zeros(5, 4, dtype=torch.float64), "b": torch.zeros(6, dtype=torch.float64)}


def random_view(stream: numpy.random.Generator) -> View:
    """A view of some tensors of GLOBAL: per dimension a slice, an index vector, or nothing."""

    def region(size: int) -> Any:
        if stream.random() < 0.5:
            start, stop = sorted(stream.integers(0, size + 1, 2).tolist())
            return slice(start, stop)
        return torch.tensor(stream.permutation(size)[: stream.integers(0, size + 1)])

    regions = {n: tuple(region(s) for s in t.shape[: stream.integers(0, t.dim() + 1)]) for n, t in GLOBAL.items()}
    scales = {n: float(stream.choice([0.5, 2.0, 4.0])) for n in regions if stream.random() < 0.5}
    names = [n for n in regions if stream.random() < 0.8]
    return View({n: regions[n] for n in names}, {n: s for n, s in scales.items() if n in names})


def places(view: View, name: str) -> list[tuple[int, ...]]:
    """Every viewed place of GLOBAL[name] in the order of the values: the slow, obvious way."""
    region, shape = view.regions[name], GLOBAL[name].shape
    axes = []
    for d, size in enumerate(shape):
        entry = region[d] if d < len(region) else slice(0, size)
        axes.append(list(range(entry.start or 0, entry.stop)) if isinstance(entry, slice) else entry.tolist())
    return list(itertools.product(*axes))


@given(st.integers(0, 100_000), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_owned_mean_against_brute_force(seed: int, clients: int) -> None:
    stream = numpy.random.default_rng(seed)
    total = {n: numpy.zeros(t.shape) for n, t in GLOBAL.items()}
    weight = {n: numpy.zeros(t.shape) for n, t in GLOBAL.items()}
    reduction = Reduction(OwnedMean(), {"update": GLOBAL})
    for client in range(clients):
        view, n = random_view(stream), float(stream.integers(0, 9))
        values = {name: torch.tensor(stream.normal(size=v.shape)) for name, v in view.extract(GLOBAL).items()}
        upload = decode(encode(Upload(Owned(values, view), n)))
        assert isinstance(upload, Upload)
        reduction.add(f"c{client}", upload)
        for name, tensor in values.items():
            for place, value in zip(places(view, name), tensor.flatten().tolist(), strict=True):
                total[name][place] += n * value / view.scales.get(name, 1.0)
                weight[name][place] += n
    update = reduction.result(clients)
    found = update.parts["update"].mean(GLOBAL) if update.parts else {n: t.float() for n, t in GLOBAL.items()}  # type: ignore[attr-defined]
    for name in GLOBAL:
        expected = numpy.divide(total[name], weight[name], out=numpy.zeros_like(total[name]), where=weight[name] > 0)
        assert found[name].shape == GLOBAL[name].shape
        assert numpy.allclose(found[name].numpy(), expected, rtol=1e-6, atol=1e-6)
        assert not found[name].numpy()[weight[name] == 0].any(), "entries nobody owns stay exactly zero"


def test_owned_mean_in_the_shapes_of_the_state() -> None:
    """Without them a mean of the first row alone would be [1, 4] and be added to all five rows by broadcasting."""
    part = Owned({"w": torch.ones(1, 4)}, View({"w": (slice(0, 1),)}))
    found = reduce(OwnedMean(), [part])
    assert found.mean()["w"].shape == (1, 4)
    full = found.mean(GLOBAL)
    assert full.keys() == GLOBAL.keys()
    assert full["w"].shape == (5, 4)
    assert full["w"].sum().item() == 4.0
    assert not full["b"].any()


def test_owned_mean_weights() -> None:
    one = Owned({"w": torch.full((2, 4), 3.0)}, View({"w": (slice(0, 2),)}))
    two = Owned({"w": torch.full((1, 4), 9.0)}, View({"w": (torch.tensor([1]),)}))
    by_examples = reduce(OwnedMean(), [one, two], [1.0, 2.0]).mean(GLOBAL)["w"]
    assert by_examples[:, 0].tolist() == [3.0, 7.0, 0.0, 0.0, 0.0]
    uniform = reduce(OwnedMean("uniform"), [one, two], [1.0, 2.0]).mean(GLOBAL)["w"]
    assert uniform[:, 0].tolist() == [3.0, 6.0, 0.0, 0.0, 0.0]
    nothing = reduce(OwnedMean(), [one], [0.0]).mean(GLOBAL)["w"]
    assert not nothing.any()


def test_an_owned_sum_travels() -> None:
    found = reduce(OwnedMean(), [Owned({"w": torch.ones(2)}, View({"w": (slice(1, 3),)}))], [2.0])
    back = decode(encode(Message({"s": found}))).parts["s"]
    assert isinstance(back, OwnedSum)
    assert torch.equal(back.mean()["w"], found.mean()["w"])
    assert back.mean()["w"].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "part",
    [
        Dense({"w": torch.zeros(5, 4)}),
        Owned({"w": torch.zeros(2, 4)}, View({"w": (slice(4, 6),)})),
        Owned({"w": torch.zeros(1, 4)}, View({"w": (torch.tensor([10**12]),)})),
        Owned({"w": torch.zeros(2, 4)}, View({"w": (slice(0, 3),)})),
        Owned({"w": torch.zeros(2, 3)}, View({"w": (slice(0, 2),)})),
        Owned({"w": torch.zeros(2)}, View({"w": (slice(0, 2),)})),
        Owned({"w": torch.zeros(4, 4)}, View({"w": ()})),
        Owned({"w": torch.zeros(())}, View({"w": ()})),
        Owned({"w": torch.zeros(1, 1, 1)}, View({"w": (slice(0, 1), slice(0, 1), slice(0, 1))})),
        Owned({}, View({"w": ()})),
        Owned({"w": torch.zeros(5, 4), "b": torch.zeros(6)}, View({"w": ()})),
        Owned({"x": torch.zeros(2)}, View({"x": (slice(0, 2),)})),
    ],
)
def test_an_owned_part_outside_the_state_is_rejected_whole(part: Part) -> None:
    reduction = Reduction(OwnedMean(), {"update": GLOBAL})
    good = Upload(Owned({"b": torch.ones(6)}, View({"b": ()})), 1.0)
    reduction.add("good", good)
    before = reduction.result(1).parts["update"].mean(GLOBAL)  # type: ignore[attr-defined]
    bad = Upload(part, 1.0)
    with pytest.raises(UploadRejected):
        reduction.add("bad", bad)
    after = reduction.result(1)
    assert after.clients == 1
    assert all(torch.equal(after.parts["update"].mean(GLOBAL)[n], before[n]) for n in before)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "part",
    [
        Owned({"w": torch.zeros(2, 3)}, View({"w": (slice(0, 2),)})),
        Owned({"w": torch.zeros(4)}, View({"w": (slice(0, 4),)})),
        Owned({"b": torch.zeros(1), "w": torch.zeros(2, 3)}, View({"b": (slice(0, 1),), "w": (slice(0, 2),)})),
        Owned({"w": torch.zeros(2, 4)}, View({"w": (slice(0, 3),)})),
    ],
)
def test_without_a_state_to_compare_with_owners_are_compared_with_each_other(part: Part) -> None:
    running = OwnedMean().begin()
    first = Owned({"w": torch.ones(3, 4)}, View({"w": ()}))
    running.check(first, "a")
    running.add(first, 1.0, "a")
    with pytest.raises(UploadRejected):
        running.check(part, "b")
    assert set(running.result().sums) == {"w"}
    assert running.result().sums["w"].shape == (3, 4)


def test_an_owned_mean_needs_to_know_how_large_the_state_is() -> None:
    with pytest.raises(ConfigError, match="how large it may be"):
        Reduction({"blocks": OwnedMean()}, {})


# -- collect ----------------------------------------------------------------------------------------------------------


def test_collect_keeps_every_part_in_the_order_of_the_clients() -> None:
    reduction = Reduction({"texts": Collect()})
    for client in ("c", "a", "b"):
        reduction.add(client, Upload(texts=Texts((client,))))
    update = reduction.result(3)
    assert list(update.collected["texts"]) == ["a", "b", "c"]
    assert update.collected["texts"]["b"] == Texts(("b",))
    assert update.parts == {}


# -- uploads, whole or not at all -------------------------------------------------------------------------------------

STATE = {"w": torch.zeros(3), "b": torch.zeros(2)}


def two_parts() -> Reduction:
    return Reduction(
        {"update": Mean(), "control": Mean("uniform"), "facts": Mean()}, {"update": STATE, "control": STATE}
    )


def good(value: float, weight: float = 1.0) -> Upload:
    tree = {n: torch.full_like(t, value) for n, t in STATE.items()}
    return Upload(tree, weight, {"loss": (value, 1.0)}, control=tree, facts=Scalars({"n": value}))


def broken(name: str) -> Upload:
    upload = good(100.0, 50.0)
    tree = upload["control"]
    changes: dict[str, dict[str, Part]] = {
        "shape": {"control": Dense({**tree, "b": torch.zeros(3)})},
        "broadcastable shape": {"control": Dense({**tree, "b": torch.zeros(1)})},
        "dimensions": {"control": Dense({**tree, "b": torch.zeros(1, 2)})},
        "missing tensor": {"control": Dense({"w": tree["w"]})},
        "extra tensor": {"control": Dense({**tree, "c": torch.zeros(1)})},
        "misspelt tensor": {"control": Dense({"w": tree["w"], "B": tree["b"]})},
        "no tensors": {"control": Dense({})},
        "scalars for dense": {"control": Scalars({"w": 1.0, "b": 1.0})},
        "texts for dense": {"control": Texts(("x",))},
        "owned for dense": {"control": Owned(dict(tree), View.whole(tree))},
        "dense for scalars": {"facts": Dense({"n": torch.zeros(())})},
        "other scalars": {"facts": Scalars({"m": 1.0})},
        "texts for scalars": {"facts": Texts(("x",))},
        "unknown part": {"contrl": Dense(dict(tree))},
    }
    if name == "missing part":
        del upload.parts["control"]
    else:
        upload.parts.update(changes[name])
    return upload


BROKEN = [
    "shape",
    "broadcastable shape",
    "dimensions",
    "missing tensor",
    "extra tensor",
    "misspelt tensor",
    "no tensors",
    "scalars for dense",
    "texts for dense",
    "owned for dense",
    "dense for scalars",
    "other scalars",
    "texts for scalars",
    "unknown part",
    "missing part",
]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_upload_leaves_no_trace(name: str) -> None:
    """The fault is in the second part or later, so that the first would already be taken by a careless loop."""
    reduction = two_parts()
    reduction.add("a", good(1.0))
    with pytest.raises(UploadRejected):
        reduction.add("bad", broken(name))
    reduction.add("b", good(3.0))
    update = reduction.result(5)
    assert update.params["w"].tolist() == [2.0] * 3
    assert update["control"]["b"].tolist() == [2.0] * 2
    assert update.parts["facts"] == Scalars({"n": 2.0})
    assert (update.clients, update.weight, update.population) == (2, 2.0, 5)
    assert update.metrics == {"loss": (4.0, 2.0)}


@pytest.mark.parametrize("name", [n for n in BROKEN if n not in ("dense for scalars", "other scalars")])
def test_a_broken_upload_that_comes_first_is_rejected_as_well(name: str) -> None:
    """It must not become the measure that honest clients are held to. (Scalars have no expected names to go by.)"""
    reduction = two_parts()
    with pytest.raises(UploadRejected):
        reduction.add("bad", broken(name))
    reduction.add("a", good(1.0))
    assert reduction.result(1).params["w"].tolist() == [1.0] * 3


def test_a_misspelt_part_or_tensor_gets_its_nearest_name() -> None:
    with pytest.raises(UploadRejected, match=r"part 'contrl' without a reducer.*Did you mean 'control'\?"):
        two_parts().add("bad", broken("unknown part"))
    with pytest.raises(UploadRejected, match=r"missing 'b' \(1 missing, 1 unexpected\).*Did you mean 'b'\?"):
        two_parts().add("bad", broken("misspelt tensor"))


def test_one_reducer_is_the_reducer_of_the_update() -> None:
    reduction = Reduction(Mean(), {"update": STATE})
    reduction.add("a", Upload({n: t + 1 for n, t in STATE.items()}, 3.0))
    update = reduction.result(9)
    assert update.params["w"].tolist() == [1.0] * 3
    assert (update.clients, update.population, update.weight) == (1, 9, 3.0)


def test_no_reducers_no_parts() -> None:
    reduction = Reduction({})
    reduction.add("a", Upload(None, 3.0, {"loss": (1.0, 2.0)}))
    update = reduction.result(1)
    assert (update.parts, update.collected, update.clients) == ({}, {}, 1)
    with pytest.raises(UploadRejected):
        reduction.add("b", Upload({"w": torch.zeros(1)}))


def test_a_kind_that_changes_from_client_to_client_is_rejected() -> None:
    reduction = Reduction(Mean())
    reduction.add("a", Upload(Dense({"coefficients": torch.ones(2)})))
    with pytest.raises(UploadRejected, match="seed-coefficients"):
        reduction.add("b", Upload(SeedCoefficients(torch.ones(2))))


def test_texts_have_no_mean() -> None:
    with pytest.raises(UploadRejected, match="texts part has no mean"):
        Reduction(Mean()).add("a", Upload(Texts(("x",))))


@pytest.mark.parametrize(("most_bytes", "alive_at_most"), [(512 * 2**20, WAITING + 1), (1, 2)])
def test_a_thousand_uploads_do_not_lie_in_memory(
    most_bytes: int, alive_at_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few small uploads wait for each other, a large one is freed as soon as the next comes; nothing else is held."""
    monkeypatch.setattr(reducer, "WAITING_BYTES", most_bytes)
    reduction = Reduction(Mean(), {"update": {"w": torch.zeros(10_000)}})
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for number in range(1000):
        tensor = torch.full((10_000,), float(number))
        alive.append(weakref.ref(tensor))
        reduction.add(f"c{number}", Upload({"w": tensor}, 1.0))
        del tensor
        most = max(most, sum(ref() is not None for ref in alive[-20:]))
    assert reduction.result(1000).params["w"][0].item() == 499.5
    gc.collect()
    assert most <= alive_at_most
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("count", [1, WAITING - 1, WAITING, WAITING + 1, 3 * WAITING])
def test_waiting_changes_no_bit(count: int) -> None:
    """The sums are those of adding one after the other, whatever waits and however long a stretch is."""
    draw = torch.Generator().manual_seed(count)
    sent = [{"w": torch.randn(3, STRETCH // 2 + 7, generator=draw).t(), "b": torch.randn((), generator=draw)}
            for _ in range(count)]  # fmt: skip
    reduction = Reduction(Mean())
    for number, tree in enumerate(sent):
        reduction.add(f"c{number}", Upload(tree, 1.0 + number))
    found = reduction.result(count).params
    for name in ("w", "b"):
        total = torch.zeros(sent[0][name].shape, dtype=torch.float64)
        for number, tree in enumerate(sent):
            total.add_(tree[name], alpha=1.0 + number)
        assert torch.equal(found[name], (total / sum(1.0 + n for n in range(count))).float())


def test_the_same_with_owners() -> None:
    reduction = Reduction(OwnedMean(), {"update": {"w": torch.zeros(1000)}})
    alive: list[weakref.ref[torch.Tensor]] = []
    for number in range(200):
        tensor = torch.ones(500)
        alive.append(weakref.ref(tensor))
        reduction.add(f"c{number}", Upload(Owned({"w": tensor}, View({"w": (slice(number, number + 500),)})), 1.0))
        del tensor
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_threads_share_the_work_and_give_the_same_bits() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (300, 301), "b": (STRETCH + 70_000,), "c": (3,), "d": (2, 40_000)}
    sent = [Upload({n: torch.randn(s, generator=draw) for n, s in shapes.items()}, weight=1.0 + k) for k in range(11)]

    def mean(threads: int) -> dict[str, torch.Tensor]:
        torch.set_num_threads(threads)
        reduction = Reduction(Mean(), {"update": sent[0].update})
        for number, upload in enumerate(sent):
            reduction.add(f"c{number}", upload)
        return reduction.result(11).params

    before = torch.get_num_threads()
    try:
        one, three = mean(1), mean(3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], three[name]) for name in shapes)


@pytest.mark.parametrize("together", [(True,) * 9, (False, True, True), (True, False), (True, True, True, False)])
def test_uploads_in_one_piece_are_added_as_those_apart(together: tuple[bool, ...]) -> None:
    """What came out of a message lies in one piece; the sum is that of its tensors, whatever else waits with it."""
    draw = torch.Generator().manual_seed(1)
    trees = [
        {"b": torch.randn(4, 5, generator=draw), "a": torch.randn(7, generator=draw).bfloat16().float()}
        for _ in together
    ]
    expected, mixed = Reduction(Mean()), Reduction(Mean())
    for number, (tree, whole) in enumerate(zip(trees, together, strict=True)):
        upload = Upload(tree, 1.0 + number)
        again = decode(encode(upload))
        assert isinstance(again, Upload) and in_one_piece(again.update.values()) is not None
        expected.add(f"c{number}", upload)
        mixed.add(f"c{number}", again if whole else Upload(dict(reversed(tree.items())), 1.0 + number))
    left, right = expected.result(9).params, mixed.result(9).params
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
