"""Inversion: gradients of small models by autograd are the reference; what is found must be what went in."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy
import pytest
import torch
from scipy.optimize import linprog  # pyright: ignore[reportMissingTypeStubs]
from torch import nn
from torch.nn.functional import cross_entropy, gelu

from fedllm.blocks import inversion
from fedllm.blocks.inversion import (
    Match,
    distance,
    label_counts,
    linear_input,
    match,
    nearest_tokens,
    revealed_labels,
)
from fedllm.core.errors import ConfigError, DataError, FedLLMError, UploadRejected
from fedllm.core.tensors import Tensors

SEEDS = range(10)
F64 = torch.float64


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=F64)


def mlp(seed: int, *widths: int) -> nn.Sequential:
    """Linear layers with tanh between them, in float64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for left, right in itertools.pairwise(widths):
        layers += [nn.Linear(left, right), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


class TinyEncoder(nn.Module):
    """Embedding, a gelu layer, mean pooling, a classifier: what a BERT-like model is to an inversion."""

    def __init__(self, seed: int, vocabulary: int = 200, width: int = 8, hidden: int = 32, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(vocabulary, width, dtype=F64)
        self.dense = nn.Linear(width, hidden, dtype=F64)
        self.head = nn.Linear(hidden, classes, dtype=F64)

    def read(self, embedded: torch.Tensor) -> torch.Tensor:
        return self.head(gelu(self.dense(embedded)).mean(1))


def gradient(model: nn.Module, loss: torch.Tensor, graph: bool = False) -> Tensors:
    """Of all but the embedding, which would give the tokens away."""
    held = {name: each for name, each in model.named_parameters() if not name.startswith("embedding")}
    return dict(zip(held, torch.autograd.grad(loss, list(held.values()), create_graph=graph), strict=True))


def layer(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor]:
    found = gradient(model, cross_entropy(model(x), y))
    return found[f"{at}.weight"], found[f"{at}.bias"]


def tree(seed: int) -> Tensors:
    return {"a": normal(seed, 3, 2), "b": normal(seed + 1000, 5)}


def flat(one: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([one[name].reshape(-1) for name in sorted(one)])


# -- distance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_distances_are_those_of_the_concatenations(seed: int) -> None:
    one, two = tree(seed), tree(seed + 50)
    left, right = flat(one), flat(two)
    assert float(distance(one, two, "l2")) == pytest.approx(float((left - right).square().sum()), rel=1e-12)
    cosine = float(left @ right / left.norm() / right.norm())
    assert float(distance(one, two, "cosine")) == pytest.approx(1 - cosine, rel=1e-12)
    assert abs(float(distance(one, one, "cosine"))) < 1e-12 and float(distance(one, one, "l2")) == 0
    reordered = dict(reversed(one.items()))
    assert float(distance(reordered, one, "l2")) == 0


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_a_cosine_does_not_see_the_scale(factor: float) -> None:
    one, two = tree(1), tree(2)
    larger = {name: factor * each for name, each in two.items()}
    assert float(distance(one, larger, "cosine")) == pytest.approx(float(distance(one, two, "cosine")), rel=1e-12)
    assert float(distance(one, larger, "l2")) != pytest.approx(float(distance(one, two, "l2")), rel=1e-3)


def test_a_zero_gradient_is_at_distance_one_and_differentiable() -> None:
    some = tree(0)
    none = {name: torch.zeros_like(each).requires_grad_() for name, each in some.items()}
    assert float(distance(some, none, "cosine").detach()) == 1
    assert float(distance(none, none, "cosine").detach()) == 1
    found = distance(none, some, "cosine")
    assert float(found.detach()) == 1
    assert all(bool(torch.isfinite(each).all()) for each in torch.autograd.grad(found, list(none.values())))


# -- match -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 3, 4, 6])
def test_dlg_recovers_an_input_and_its_label(seed: int) -> None:
    model, x = mlp(seed, 8, 16, 16, 5), normal(seed, 1, 8)
    label = torch.randint(5, (1,), generator=rng(seed))
    target = gradient(model, cross_entropy(model(x), label))

    def of(point: Tensors) -> Tensors:
        return gradient(model, cross_entropy(model(point["x"]), point["y"].softmax(-1)), True)

    start = {"x": normal(seed + 100, 1, 8), "y": normal(seed + 200, 1, 5)}
    found = match(of, start, target, kind="l2", optimizer="lbfgs", steps=60, lr=1.0)
    assert float((found.point["x"] - x).abs().max()) < 1e-3
    assert int(found.point["y"].argmax()) == int(label)
    assert found.distance == pytest.approx(float(distance(of(found.point), target, "l2").detach()), rel=1e-9)
    assert all(each.grad is None for each in model.parameters())


@pytest.mark.parametrize(
    ("seed", "kind", "optimizer", "steps", "lr"),
    [(3, "cosine", "signed-adam", 300, 0.1), (0, "l2", "lbfgs", 60, 1.0), (4, "l2", "lbfgs", 60, 1.0)],
)
def test_tokens_come_back_without_the_embeddings_gradient_from_three_starts(
    seed: int, kind: Any, optimizer: Any, steps: int, lr: float
) -> None:
    model, draw = TinyEncoder(seed), rng(seed)
    ids, label = torch.randint(200, (1, 4), generator=draw), torch.randint(3, (1,), generator=draw)
    target = gradient(model, cross_entropy(model.read(model.embedding(ids)), label))

    def of(point: Tensors) -> Tensors:
        return gradient(model, cross_entropy(model.read(point["x"]), label), True)

    starts = [{"x": torch.randn(1, 4, 8, generator=draw, dtype=F64)} for _ in range(3)]
    found = match(of, starts, target, kind=kind, optimizer=optimizer, steps=steps, lr=lr)
    tokens = nearest_tokens(found.point["x"], model.embedding.weight)
    assert Counter(tokens[0].tolist()) == Counter(ids[0].tolist())  # a mean has no order


def nothing(point: Tensors) -> Tensors:
    """A 'gradient' that is the dummy input itself."""
    return {"g": point["x"] * 1.0}


@pytest.mark.parametrize(
    ("optimizer", "lr", "bound"), [("signed-adam", 0.1, 0.1), ("adam", 0.1, 0.1), ("lbfgs", 1.0, 1e-12)]
)
def test_a_cosine_match_does_not_see_the_scale_of_the_target(optimizer: Any, lr: float, bound: float) -> None:
    target, start = {"g": normal(0, 4)}, {"x": normal(1, 4)}
    one, two = (
        match(nothing, start, {"g": factor * target["g"]}, kind="cosine", optimizer=optimizer, steps=40, lr=lr)
        for factor in (1.0, 64.0)
    )
    assert torch.equal(one.point["x"], two.point["x"]) and one.trace == two.trace  # a power of 2 rounds nothing
    assert one.distance < bound * one.trace[0]


def test_signed_adam_lowers_its_rate_three_times_and_sees_signs_only() -> None:
    seen: list[float] = []

    def of(point: Tensors) -> Tensors:
        seen.append(float(point["x"].detach()[0]))
        return {"g": point["x"] * 1.0}

    start, target = {"x": torch.zeros(2, dtype=F64)}, {"g": torch.tensor([1e6, -1e3], dtype=F64)}
    found = match(of, start, target, kind="l2", optimizer="signed-adam", steps=16, lr=0.1)
    moves = numpy.diff(seen[1:])
    assert moves == pytest.approx([0.1] * 6 + [0.01] * 4 + [0.001] * 4 + [0.0001] * 2, rel=1e-6)
    assert torch.allclose(found.point["x"][0], -found.point["x"][1])
    assert len(found.trace) == 17 and list(found.trace) == sorted(found.trace, reverse=True)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam", "signed-adam"])
def test_steps_out_of_what_is_finite_are_survived(optimizer: Any) -> None:
    def of(point: Tensors) -> Tensors:
        return {"g": point["x"].log()}  # NaN below 0

    target = {"g": torch.tensor([0.01, 0.5], dtype=F64).log()}
    start = {"x": torch.tensor([5.0, 5.0], dtype=F64)}
    found = match(of, start, target, kind="l2", optimizer=optimizer, steps=200, lr=3.0)
    assert math.isfinite(found.distance) and found.distance < 0.2 * found.trace[0]
    assert bool((found.point["x"] > 0).all()) and not any(math.isnan(each) for each in found.trace)
    assert found.distance == pytest.approx(float(distance(of(found.point), target, "l2")), rel=1e-9)
    assert found.distance <= min(found.trace) + 1e-15
    if optimizer == "lbfgs":
        assert found.distance < 1e-12  # its line search halves its way back
    else:
        assert math.inf in found.trace


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_the_best_point_is_returned_and_not_the_last(optimizer: Any) -> None:
    found = match(
        nothing, {"x": normal(1, 3)}, {"g": normal(1, 3) + 1e-3}, kind="l2", optimizer=optimizer, steps=3, lr=50
    )
    assert found.distance <= found.trace[0]
    assert found.distance == float(distance({"g": found.point["x"]}, {"g": normal(1, 3) + 1e-3}, "l2"))
    if optimizer == "adam":
        assert found.distance < found.trace[-1]


def test_the_best_of_several_starts_wins_and_starts_stay_as_they_are() -> None:
    def of(point: Tensors) -> Tensors:
        return {"g": (point["x"] ** 2 - 1) ** 2 + 0.1 * point["x"]}  # two valleys

    starts = [{"x": torch.tensor([at], dtype=F64)} for at in (1.5, -1.5, 0.9)]
    target = {"g": torch.tensor([-0.1], dtype=F64)}
    options: dict[str, Any] = {"kind": "l2", "optimizer": "lbfgs", "steps": 30, "lr": 1.0}
    each = [match(of, start, target, **options) for start in starts]
    best = match(of, starts, target, **options)
    assert best.start == min(range(3), key=lambda i: each[i].distance) == 1
    assert best.distance == each[1].distance and best.trace == each[1].trace
    assert [float(start["x"]) for start in starts] == [1.5, -1.5, 0.9]
    bad = {"x": torch.tensor([1e200], dtype=F64)}
    assert match(of, [bad, *starts], target, **options).start == 2
    with pytest.raises(DataError, match="None of 1 starts"):
        match(of, bad, target, **options)


def test_a_prior_pulls_and_is_left_out_of_the_distance() -> None:
    def small(point: Tensors) -> torch.Tensor:
        return point["x"].square().sum()

    start, target = {"x": normal(0, 3)}, {"g": normal(1, 3)}
    found = match(
        nothing, start, target, kind="l2", optimizer="lbfgs", steps=30, lr=1.0, prior=small, prior_weight=0.25
    )
    assert torch.allclose(found.point["x"], target["g"] / 1.25, atol=1e-8)  # of |x - t|^2 + |x|^2 / 4
    assert found.distance == pytest.approx(float((target["g"] / 5).square().sum()))
    assert found.trace[-1] == pytest.approx(found.distance + 0.25 * float(small(found.point)))


def test_a_match_is_the_same_each_time_and_wherever_it_is_called() -> None:
    def run() -> Match:
        model = mlp(0, 4, 6, 3)
        target = gradient(model, cross_entropy(model(x), torch.tensor([1])))

        def of(point: Tensors) -> Tensors:
            return gradient(model, cross_entropy(model(point["x"]), torch.tensor([1])), True)

        return match(of, {"x": normal(3, 1, 4)}, target, kind="cosine", optimizer="adam", steps=20, lr=0.1)

    x = normal(2, 1, 4)
    one, two = run(), run()
    assert one.trace == two.trace and torch.equal(one.point["x"], two.point["x"])
    assert not one.point["x"].requires_grad
    with torch.inference_mode():
        three = match(
            nothing, {"x": normal(3, 4)}, {"g": normal(4, 4)}, kind="cosine", optimizer="lbfgs", steps=20, lr=1.0
        )
    assert three.distance < 1e-12


def test_float32_starts_stay_float32() -> None:
    start, target = {"x": normal(0, 3).float()}, {"g": normal(1, 3).float()}
    found = match(nothing, start, target, kind="l2", optimizer="lbfgs", steps=20, lr=1.0)
    assert found.point["x"].dtype == torch.float32 and found.distance < 1e-10


GOOD: dict[str, Any] = {
    "gradient_of": nothing,
    "start": {"x": torch.ones(2)},
    "target": {"g": torch.ones(2)},
    "kind": "l2",
    "optimizer": "adam",
    "steps": 2,
    "lr": 0.1,
}


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"optimizer": "sgd"}, ConfigError, "no optimizer 'sgd'"),
        ({"kind": "l1"}, ConfigError, "no kind of distance 'l1'"),
        ({"steps": 0}, ConfigError, "steps=0"),
        ({"lr": 0.0}, ConfigError, "lr=0.0"),
        ({"lr": math.nan}, ConfigError, "lr=nan"),
        ({"prior_weight": 1.0}, ConfigError, "without a prior"),
        ({"prior": lambda point: point["x"].sum()}, ConfigError, "0.0 with a prior"),
        ({"prior": lambda point: point["x"].sum(), "prior_weight": -1.0}, ConfigError, "-1.0 with a prior"),
        ({"target": {"g": torch.tensor([1.0, math.nan])}}, DataError, "'g' is not finite"),
        ({"target": {}}, DataError, "empty"),
        ({"target": {"g": torch.zeros(2)}, "kind": "cosine"}, DataError, "gradient is 0"),
        ({"target": {"h": torch.ones(2)}}, UploadRejected, "missing 'h'"),
        ({"target": {"g": torch.ones(3)}}, UploadRejected, "shape"),
        ({"start": {"x": torch.tensor([1.0, math.inf])}}, DataError, "'x' is not finite"),
        ({"start": {"x": torch.ones(2, dtype=torch.int64)}}, ConfigError, "another dtype"),
        ({"start": {"x": torch.ones(2, dtype=torch.float16)}}, ConfigError, "another dtype"),
        ({"start": {}}, ConfigError, "no tensor"),
        ({"start": []}, DataError, "None of 0 starts"),
        ({"start": {"x": torch.ones(2), "y": torch.ones(1)}}, ConfigError, "dummy input 'y'"),
        ({"gradient_of": lambda point: {"g": point["x"].detach()}}, ConfigError, "dummy input 'x'"),
    ],
)
def test_a_match_refuses(changed: dict[str, Any], error: type[FedLLMError], words: str) -> None:
    with pytest.raises(error, match=words):
        match(**{**GOOD, **changed})


def test_a_distance_refuses() -> None:
    with pytest.raises(ConfigError, match="kind of distance"):
        distance(tree(0), tree(0), "l1")  # type: ignore[arg-type]
    with pytest.raises(UploadRejected, match="missing 'b'"):
        distance({"a": tree(0)["a"]}, tree(0), "l2")
    with pytest.raises(DataError, match="not finite"):
        distance(tree(0), {**tree(0), "b": torch.full((5,), math.inf)}, "l2")


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cells", [1, 37, 1 << 22])
def test_nearest_tokens_are_those_of_brute_force(seed: int, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inversion, "CELLS", cells)
    table, wanted = normal(seed, 31, 4), normal(seed + 100, 2, 3, 4)
    euclidean = (wanted[..., None, :] - table).norm(dim=-1)
    cosine = torch.cosine_similarity(wanted[..., None, :], table, dim=-1)
    assert torch.equal(nearest_tokens(wanted, table, by="euclidean"), euclidean.argmin(-1))
    assert torch.equal(nearest_tokens(wanted, table), cosine.argmax(-1))
    allowed = [30, 2, 7, 7, 11]
    among = torch.tensor(sorted(set(allowed)))
    assert torch.equal(nearest_tokens(wanted, table, allowed), among[cosine[..., among].argmax(-1)])
    assert nearest_tokens(wanted[0, 0], table).shape == ()
    ids = torch.randint(31, (2, 5), generator=rng(seed))
    assert torch.equal(nearest_tokens(3 * table[ids], table), ids)


@pytest.mark.parametrize("cells", [1, 1 << 22])
def test_nearest_tokens_break_ties_by_the_lowest_id_and_pass_over_padding(
    cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inversion, "CELLS", cells)
    table = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, -1.0]])
    assert nearest_tokens(torch.tensor([[5.0, 0.0], [-1.0, 1.0]]), table).tolist() == [1, 1]
    assert nearest_tokens(torch.tensor([0.1, 0.0]), table, by="euclidean").item() == 0
    assert nearest_tokens(torch.zeros(0, 2), table).shape == (0,)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"by": "dot"}, ConfigError),
        ({"embeddings": torch.ones(3)}, DataError),
        ({"embeddings": torch.tensor(1.0)}, DataError),
        ({"embeddings": torch.tensor([1.0, math.nan])}, DataError),
        ({"embeddings": torch.zeros(2)}, DataError),
        ({"table": torch.ones(2)}, DataError),
        ({"table": torch.zeros(3, 2)}, DataError),
        ({"table": torch.full((3, 2), math.inf)}, DataError),
        ({"table": torch.ones(0, 2)}, DataError),
        ({"allowed": []}, DataError),
        ({"allowed": [3]}, DataError),
        ({"allowed": [-1]}, DataError),
    ],
)
def test_nearest_tokens_refuse(given: dict[str, Any], error: type[FedLLMError]) -> None:
    whole: dict[str, Any] = {"embeddings": torch.ones(2), "table": torch.ones(3, 2), **given}
    with pytest.raises(error):
        nearest_tokens(**whole)


# -- the gradient of one linear layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_input_of_a_linear_layer_is_exact_for_one_example(seed: int) -> None:
    model, x = mlp(seed, 7, 9, 4), normal(seed, 1, 7)
    y = torch.randint(4, (1,), generator=rng(seed))
    assert torch.allclose(linear_input(*layer(model, x, y, 0)), x[0], atol=1e-12)
    assert torch.allclose(linear_input(*layer(model, x, y, 2)), model[:2](x)[0], atol=1e-12)
    assert torch.allclose(linear_input(*(each.float() for each in layer(model, x, y, 0))), x[0], atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_gives_a_mixture_of_its_inputs(seed: int) -> None:
    model, x = mlp(seed, 7, 9, 4), normal(seed, 3, 7)
    y = torch.randint(4, (3,), generator=rng(seed))
    before = model[0](x)
    shares = torch.autograd.grad(cross_entropy(model[1:](before), y), before)[0]
    row = int(shares.sum(0).abs().argmax())
    wanted = (shares[:, row, None] * x).sum(0) / shares[:, row].sum()
    assert torch.allclose(linear_input(*layer(model, x, y, 0)), wanted, atol=1e-10)


def test_an_input_cannot_be_read_from_nothing() -> None:
    with pytest.raises(DataError, match="All gradients of the bias are 0"):
        linear_input(torch.ones(2, 3), torch.zeros(2))
    for weight, bias in (
        (torch.ones(2, 3), torch.ones(3)),
        (torch.ones(3), torch.ones(3)),
        (torch.ones(0, 3), torch.ones(0)),
        (torch.full((2, 3), math.nan), torch.ones(2)),
        (torch.ones(2, 3), torch.tensor([1.0, math.inf])),
    ):
        with pytest.raises(DataError):
            linear_input(weight, bias)


@pytest.mark.parametrize("seed", SEEDS)
def test_label_counts_are_exact_where_probabilities_are(seed: int) -> None:
    for classes, batch in ((3, 1), (5, 8), (50, 32)):
        model, x = mlp(seed, 6, 8, classes), 3 * normal(seed, batch, 6)
        y = torch.randint(classes, (batch,), generator=rng(seed))
        found = label_counts(layer(model, x, y, 2)[1], model(x).softmax(-1).mean(0), batch)
        assert found.dtype == torch.int64 and torch.equal(found, torch.bincount(y, minlength=classes))
        low = layer(model.float(), x.float(), y, 2)[1]
        assert torch.equal(label_counts(low, model(x.float()).softmax(-1).mean(0), batch), found)


@pytest.mark.parametrize("seed", SEEDS)
def test_label_counts_of_estimates_are_the_nearest_in_squares(seed: int) -> None:
    draw = numpy.random.default_rng(seed)
    for classes, batch in ((2, 5), (3, 4), (4, 6)):
        mean, bias = draw.dirichlet(numpy.ones(classes)), draw.normal(scale=0.5, size=classes)
        found = label_counts(torch.from_numpy(bias), torch.from_numpy(mean), batch).numpy()
        wanted = batch * (mean - bias)
        every = [n for n in itertools.product(range(batch + 1), repeat=classes) if sum(n) == batch]
        assert found.sum() == batch and found.min() >= 0
        assert ((found - wanted) ** 2).sum() == pytest.approx(
            min(((n - wanted) ** 2).sum() for n in map(numpy.array, every))
        )


def test_label_counts_of_a_uniform_estimate_find_the_label_of_one_example() -> None:
    for seed in SEEDS:
        model, x = mlp(seed, 6, 8, 5), normal(seed, 1, 6)
        y = torch.randint(5, (1,), generator=rng(seed))
        assert int(label_counts(layer(model, x, y, 2)[1], torch.full((5,), 0.2), 1).argmax()) == int(y)


@pytest.mark.parametrize(
    ("bias", "mean", "batch", "error"),
    [
        (torch.zeros(3), torch.full((3,), 1 / 3), 0, ConfigError),
        (torch.zeros(3), torch.full((2,), 0.5), 2, DataError),
        (torch.zeros(0), torch.zeros(0), 2, DataError),
        (torch.zeros(1, 3), torch.full((1, 3), 1 / 3), 2, DataError),
        (torch.tensor([math.nan, 0.0]), torch.full((2,), 0.5), 2, DataError),
        (torch.zeros(2), torch.tensor([math.nan, 1.0]), 2, DataError),
        (torch.zeros(2), torch.tensor([1.5, -0.5]), 2, DataError),
        (torch.zeros(2), torch.tensor([0.5, 0.6]), 2, DataError),
    ],
)
def test_label_counts_refuse(bias: torch.Tensor, mean: torch.Tensor, batch: int, error: type[FedLLMError]) -> None:
    with pytest.raises(error):
        label_counts(bias, mean, batch)


def batch_of(seed: int, classes: int, batch: int, width: int = 32) -> tuple[torch.Tensor, list[int]]:
    """The last layer's weight gradient of a batch, by autograd, and the classes in it."""
    model, x = mlp(seed, 12, width, classes), 2 * normal(seed, batch, 12)
    y = torch.randint(classes, (batch,), generator=rng(seed))
    return layer(model, x, y, 2)[0], sorted(set(y.tolist()))


@pytest.mark.parametrize("seed", range(6))
def test_revealed_labels_are_exact_well_above_the_rank(seed: int) -> None:
    for classes, batch in ((5, 1), (30, 4), (50, 8)):
        found, labels = batch_of(seed, classes, batch)
        assert revealed_labels(found) == labels
        assert revealed_labels(-1e-7 * -found.float()) == labels
        assert revealed_labels(found, rank=batch) == labels


def separable(found: torch.Tensor, rank: int, c: int) -> bool:
    rows = torch.linalg.svd(found)[0][:, :rank].numpy()
    rows = rows / numpy.linalg.norm(rows, axis=1, keepdims=True)
    signs = numpy.where(numpy.arange(len(rows)) == c, 1.0, -1.0)[:, None]
    return linprog(numpy.zeros(rank), A_ub=signs * rows, b_ub=-numpy.ones(len(rows)), bounds=(None, None)).status == 0


@pytest.mark.parametrize("seed", range(4))
def test_revealed_labels_near_the_rank_are_all_that_can_be_separated(seed: int) -> None:
    found, labels = batch_of(seed, 11, 8)
    wanted = [c for c in range(11) if separable(found, 8, c)]
    assert revealed_labels(found) == wanted
    assert set(labels) <= set(wanted)


def test_revealed_labels_are_the_same_where_the_linear_program_decides_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_up(*_: Any) -> None:
        raise RuntimeError("Maximum number of iterations reached.")

    filtered = [revealed_labels(batch_of(seed, classes, 8)[0]) for seed, classes in ((0, 11), (1, 11), (2, 30))]
    monkeypatch.setattr("scipy.optimize.nnls", gives_up)
    alone = [revealed_labels(batch_of(seed, classes, 8)[0]) for seed, classes in ((0, 11), (1, 11), (2, 30))]
    assert alone == filtered


@pytest.mark.parametrize("seed", range(6))
def test_no_label_is_lost_to_rounding_where_predictions_are_sharp(seed: int) -> None:
    """Probabilities down to 1e-20: rounding moves rows, and with long factors their cone would hold everything."""
    inputs, weights = normal(seed, 8, 32), 8 * normal(seed + 100, 50, 32) / 32**0.5
    labels = torch.randint(50, (8,), generator=rng(seed))
    errors = (inputs @ weights.T).softmax(-1) - nn.functional.one_hot(labels, 50)
    found = errors.float().T @ inputs.float() / 8
    assert set(labels.tolist()) <= set(revealed_labels(found))
    assert len(revealed_labels(found)) <= len(set(labels.tolist())) + 1


def test_revealed_labels_under_noise_need_the_batch() -> None:
    found, labels = batch_of(0, 50, 6)
    noisy = found + 1e-4 * float(found.std()) * normal(1, 50, 32)
    with pytest.raises(DataError, match="has rank 32"):
        revealed_labels(noisy)
    assert revealed_labels(noisy, rank=6) == labels
    assert revealed_labels(found.bfloat16(), rank=6) == labels


@pytest.mark.parametrize(
    ("given", "options", "error"),
    [
        (torch.zeros(5, 3), {}, DataError),
        (torch.ones(5), {}, DataError),
        (torch.ones(0, 3), {}, DataError),
        (torch.ones(5, 3, dtype=torch.int64), {}, DataError),
        (torch.full((5, 3), math.nan), {}, DataError),
        (torch.eye(5), {}, DataError),
        (torch.tensor([[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0]]), {}, DataError),
        (batch_of(0, 30, 4)[0], {"rank": 0}, ConfigError),
        (batch_of(0, 30, 4)[0], {"rank": 29}, ConfigError),
        (batch_of(0, 50, 4)[0], {"rank": 33}, ConfigError),
    ],
)
def test_revealed_labels_refuse(given: torch.Tensor, options: dict[str, Any], error: type[FedLLMError]) -> None:
    with pytest.raises(error):
        revealed_labels(given, **options)
