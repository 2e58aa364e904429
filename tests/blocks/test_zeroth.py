"""Directions from seeds - the same bits in any order and chunking, normal, independent; replay; what is refused."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.blocks import zeroth
from fedllm.blocks.zeroth import (
    Kept,
    Weighed,
    by_seed,
    chances,
    combined,
    cosines,
    direction,
    noise,
    pairs,
    plain_steps,
    pool,
    pooled,
    replay,
    replay_,
    shares,
    shift_,
)
from fedllm.core.errors import ConfigError, ModelError, UploadRejected
from fedllm.core.message import Dense, Scalars, Upload
from fedllm.core.reducer import Reduction
from fedllm.core.train import Schedule, Train

SGD = {"optimizer": "sgd", "clip_norm": None}


def test_golden_values() -> None:
    """The numbers of every machine: were they others, no client could replay what another walked."""
    found = noise([0], "w", 0, 6)[0].tolist()
    assert found == [
        -1.6005007028579712, 0.031171858310699463, 0.32432836294174194, 2.2359585762023926, -1.1064088344573975,
        -0.9528889656066895,
    ]  # fmt: skip
    far = noise([2**62 + 12345], "model.layers.0.q.lora_A", 10**12 + 1, 10**12 + 4)[0].tolist()
    assert far == [0.819890022277832, 1.1436846256256104, -0.5147302150726318]
    digest = hashlib.sha256(noise([7], "w", 0, 100_003)[0].numpy().tobytes()).hexdigest()
    assert digest == "2d9d694741d50378339175ff45677497a2ec1c7a815f11f9440b14620ac077a3"
    assert pool(5, 2) == [6505428382333033943, 7370570463083343485]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5000), st.integers(0, 700), st.integers(0, 2**63 - 1))
def test_any_piece_is_a_piece_of_the_whole(start: int, length: int, seed: int) -> None:
    whole = noise([seed], "w", 0, 6000)[0]
    assert torch.equal(noise([seed], "w", start, start + length)[0], whole[start : start + length])


def test_several_seeds_are_each_of_them() -> None:
    together = noise([3, 9, 4], "w", 5, 90)
    for row, seed in zip(together, (3, 9, 4), strict=True):
        assert torch.equal(row, noise([seed], "w", 5, 90)[0])


def test_a_direction_does_not_depend_on_the_size_of_chunks(monkeypatch: Any) -> None:
    like = torch.empty(257, 301)
    found = direction(11, "w", like)
    for size in (100, 4096, 1 << 20):
        monkeypatch.setattr(zeroth, "CHUNK", size)
        assert torch.equal(direction(11, "w", like), found)
    assert found.shape == like.shape and found.dtype == torch.float32
    assert torch.equal(direction(11, "w", like.double()), found.double())


def test_it_is_normal() -> None:
    n = 1_000_000
    z = noise([21], "w", 0, n)[0].double()
    assert abs(float(z.mean())) < 4 / n**0.5 and abs(float(z.square().mean()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float(z.pow(3).mean())) < 4 * (15 / n) ** 0.5 and abs(float(z.pow(4).mean()) - 3) < 4 * (96 / n) ** 0.5
    ordered, _ = z.sort()
    expected = torch.special.ndtr(ordered)
    assert float((expected - torch.arange(n) / n).abs().max()) < 1.63 / n**0.5, "Kolmogorov-Smirnov at 1 %"


def test_seeds_names_and_places_are_independent() -> None:
    n = 200_000
    z = noise([21], "w", 0, n)[0].double()
    others = [noise([s], "w", 0, n)[0].double() for s in (22, 20, 21 + 2**40, 0, 2**63 - 1)]
    others += [noise([21], name, 0, n)[0].double() for name in ("v", "w.", "W")]
    others += [z.roll(k) for k in (1, 2, 3, 7, 64, 1024, 2**15)]
    for other in others:
        assert abs(float((z * other).mean())) < 4.5 / n**0.5
        assert abs(float(((z.square() - 1) * (other.square() - 1)).mean())) < 4.5 * 2 / n**0.5


def test_another_table_is_refused(monkeypatch: Any) -> None:
    zeroth._table.cache_clear()
    monkeypatch.setattr(zeroth, "TABLE_HASH", "0" * 64)
    with pytest.raises(ModelError, match="another table of normal quantiles"):
        noise([0], "w", 0, 2)
    monkeypatch.undo()
    assert noise([0], "w", 0, 2).shape == (1, 2)


def tree() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"a": torch.randn(40, 30, generator=draw), "b": torch.randn(7, generator=draw), "n": torch.arange(5)}


def test_replay_is_the_sum_of_its_directions() -> None:
    start, values = tree(), torch.tensor([0.5, 0.0, -2.0])
    found = replay(start, [4, 5, 6], values, -0.1)
    for name in ("a", "b"):
        z = [direction(s, name, start[name]).double() for s in (4, 6)]
        exact = start[name].double() - 0.1 * (0.5 * z[0] - 2.0 * z[1])
        assert torch.equal(found[name], exact.float())
    assert torch.equal(found["n"], start["n"]), "integers are not moved"
    assert torch.equal(start["a"], tree()["a"]), "the start is not changed"


def test_replay_in_place_and_in_any_chunking_has_the_same_bits(monkeypatch: Any) -> None:
    seeds, values = list(range(50)), torch.randn(50, generator=torch.Generator().manual_seed(0))
    whole = replay(tree(), seeds, values, 0.01)
    for size in (16, 1000):
        monkeypatch.setattr(zeroth, "CHUNK", size)
        there = tree()
        replay_(there, seeds, values, 0.01)
        assert all(torch.equal(there[n], whole[n]) for n in whole)


def test_the_order_of_seeds_does_not_show_beyond_rounding() -> None:
    seeds, values = list(range(200)), torch.randn(200, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    start = {n: t.double() if t.is_floating_point() else t for n, t in tree().items()}
    a, b = replay(start, seeds, values), replay(start, [seeds[i] for i in order], values[order])
    assert all(torch.allclose(a[n], b[n], rtol=0, atol=1e-12) for n in a)


def test_zero_values_leave_the_bits() -> None:
    found = replay(tree(), [1, 2], torch.zeros(2))
    assert all(torch.equal(found[n], t) for n, t in tree().items())
    assert torch.equal(combined([1, 2], torch.zeros(2), "a", 0, 4), torch.zeros(4, dtype=torch.float64))


def test_shift_there_and_back() -> None:
    moved = tree()
    shift_(moved, 3, 0.1)
    assert torch.allclose(moved["a"], tree()["a"] + 0.1 * direction(3, "a", moved["a"]), atol=1e-6)
    assert torch.equal(moved["n"], tree()["n"])
    for _ in range(200):
        shift_(moved, 3, -0.2), shift_(moved, 3, 0.2)
    shift_(moved, 3, -0.1)
    assert float((moved["a"] - tree()["a"]).abs().max()) < 5e-5, "float32 hardly drifts"


def test_cosines() -> None:
    held = {n: t for n, t in tree().items() if n != "n"}
    found = cosines(held, [1, 2, 3])
    flat = torch.cat([t.flatten() for t in held.values()]).double()
    for seed, value in zip((1, 2, 3), found, strict=True):
        z = torch.cat([direction(seed, n, t).flatten() for n, t in held.items()]).double()
        assert float(value) == pytest.approx(float(z @ flat / (z.norm() * flat.norm())), abs=1e-12)
    assert torch.equal(cosines({"a": torch.zeros(4)}, [1, 2]), torch.zeros(2, dtype=torch.float64))


def test_the_pool_is_a_function_of_the_master_seed() -> None:
    seeds = pool(17, 4096)
    assert len(set(seeds)) == 4096 and seeds[:100] == pool(17, 100) and not set(seeds) & set(pool(18, 4096))


def test_pairs_by_seed_and_pooled() -> None:
    sent = pairs([2, 0, 2], torch.tensor([1.0, -2000.0, 0.5]))
    assert sum(t.nbytes for t in sent.values()) == 3 * 8
    found = by_seed(sent, 4)
    assert found["sums"].tolist() == [-2000.0, 0, 1.5, 0]
    assert found["magnitude"].tolist() == [1000.0, 0, 1.5, 0] and found["count"].tolist() == [1, 0, 2, 0]
    kept = {"a": Weighed(sent, 3.0), "b": Weighed(pairs([3], torch.tensor([4.0])), 1.0)}
    assert pooled(kept, 4, "examples")["sums"].tolist() == [-1500.0, 0, 1.125, 1.0]
    assert pooled(kept, 4, "uniform")["sums"].tolist() == [-1000.0, 0, 0.75, 2.0]
    assert pooled(kept, 4, "uniform")["count"].tolist() == [1, 0, 2, 1]
    assert shares({"a": Weighed(sent, 0.0)}, "examples") == {"a": 0.0}


def test_chances() -> None:
    none = {"magnitude": torch.zeros(4, dtype=torch.float64), "count": torch.zeros(4, dtype=torch.float64)}
    assert chances(none).tolist() == [0.25] * 4, "nothing seen, or all alike: uniform"
    seen = {"magnitude": torch.tensor([4.0, 0.0, 1.0]).double(), "count": torch.tensor([3.0, 0.0, 1.0]).double()}
    expected = torch.softmax(torch.tensor([1.0, 0.0, 0.5]).double(), 0)  # means with a first 0: 1, 0, 1/2
    assert torch.allclose(chances(seen), expected)


GOOD = pairs([1, 2], torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (Dense({**GOOD, "seed": torch.tensor([1, 4], dtype=torch.int32)}), "outside the pool"),
        (Dense({**GOOD, "seed": torch.tensor([-1, 2], dtype=torch.int32)}), "outside the pool"),
        (Dense({**GOOD, "seed": torch.tensor([1, 2])}), "int64"),
        (Dense({**GOOD, "value": torch.zeros(3)}), r"\(3,\)"),
        (Dense({**GOOD, "value": torch.zeros(2, 1)}), r"\(2, 1\)"),
        (Dense({**GOOD, "value": torch.zeros(2).double()}), "float64"),
        (Dense({"seed": GOOD["seed"]}), "Expected: seed and value"),
        (Dense({**GOOD, "more": torch.zeros(1)}), "Expected: seed and value"),
        (Dense(pairs([1, 1, 1, 1], torch.zeros(4))), "4 pairs"),
        (Scalars({"x": 1.0}), "scalars"),
    ],
)
def test_pairs_that_are_refused(part: Any, why: str) -> None:
    reduction = Reduction(Kept(3, 4))
    with pytest.raises(UploadRejected, match=why):
        reduction.add("a", Upload(part))
    reduction.add("b", Upload(GOOD, weight=2.0))
    assert list(reduction.result(2).collected["update"]) == ["b"]


def test_kept_is_in_the_order_of_names_and_is_not_linear() -> None:
    reduction = Reduction(Kept())
    for name in ("c", "a", "b"):
        reduction.add(name, Upload({"x": torch.ones(1)}, weight=2.0))
    kept = reduction.result(3).collected["update"]
    assert list(kept) == ["a", "b", "c"] and not Kept.linear
    weighed: Any = kept["a"]
    assert weighed.weight == 2.0 and Weighed.from_wire(*weighed.to_wire()) == weighed


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"optimizer": "adamw"}, "optimizer=adamw"),
        ({"momentum": 0.9}, "momentum"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"clip_norm": 1.0}, "clip_norm=1.0"),
        ({"epochs": 1}, "epochs=1"),
        ({"schedule": Schedule(kind="linear")}, "schedule.kind=linear"),
        ({"schedule": Schedule(warmup=0.1)}, "schedule.warmup"),
    ],
)
def test_steps_that_are_not_plain(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{name}.*because I say so\. Set train\."):
        plain_steps(Train(**{**SGD, **options}), "because I say so")
    plain_steps(Train(**SGD), "never")
