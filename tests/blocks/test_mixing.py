"""Mixing - the mean stays, compressed copies agree everywhere, rings give the same bits, bad messages are refused."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.blocks.compress import Compressor, Sign, TopK, compressor
from fedllm.blocks.mixing import Agreement, PublicCopies, RingMean, checked, choco, mix, push_sum, ratio
from fedllm.blocks.topology import Graph, build, complete, metropolis, push_weights, ring
from fedllm.core.errors import ConfigError, UploadRejected
from fedllm.core.tensors import Tensors

NAMES = ("identity", "top-k", "sign", "quantise")


def models(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensors]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (7,), "c": (1,)}
    return [{k: torch.randn(s, generator=draw, dtype=dtype) for k, s in shapes.items()} for _ in range(n)]


def flat(tree: Tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tree.values()])


def mean(trees: list[Tensors]) -> torch.Tensor:
    return torch.stack([flat(tree) for tree in trees]).mean(0)


def mixed(trees: list[Tensors], graph: Graph) -> list[Tensors]:
    weights = metropolis(graph)
    return [mix(x, [(weights[i, j], trees[j]) for j in graph.senders(i)]) for i, x in enumerate(trees)]


@given(
    name=st.sampled_from(["ring", "star", "complete", "exponential", "pairs"]),
    n=st.integers(1, 9),
    down=st.sets(st.integers(0, 8)),
    seed=st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_a_mix_keeps_the_mean(name: str, n: int, down: set[int], seed: int) -> None:
    trees = models(n, seed)
    graph = build(name, n, seed, round=seed).alive([i for i in range(n) if i not in down])
    after = mixed(trees, graph)
    assert torch.allclose(mean(after), mean(trees), atol=1e-12, rtol=0)
    assert all(torch.equal(flat(after[i]), flat(trees[i])) for i in down if i < n), "who is down keeps what it has"


def test_a_mix_is_the_row_of_the_matrix() -> None:
    trees, weights = models(5), torch.from_numpy(metropolis(ring(5)))
    expected = weights @ torch.stack([flat(tree) for tree in trees])
    assert torch.allclose(torch.stack([flat(tree) for tree in mixed(trees, ring(5))]), expected, atol=1e-14)


def test_peers_that_agree_stay_where_they_are_to_the_bit() -> None:
    one = models(1, dtype=torch.float32)[0]
    assert all(torch.equal(flat(tree), flat(one)) for tree in mixed([one] * 6, ring(6)))


def test_a_complete_graph_gives_the_mean() -> None:
    trees = models(6)
    assert all(torch.allclose(flat(tree), mean(trees), atol=1e-12) for tree in mixed(trees, complete(6)))


@given(name=st.sampled_from(["directed-ring", "directed-exponential", "star", "pairs"]), n=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_push_sum_keeps_both_sums_and_finds_the_mean(name: str, n: int) -> None:
    trees, masses = models(n), [1.0] * n
    first = mean(trees)
    for number in range(150):
        graph = build(name, n, 0, round=number)
        shares = push_weights(graph)
        pairs = [
            push_sum(
                (trees[i], masses[i]), shares[i, i], [(shares[i, j], trees[j], masses[j]) for j in graph.senders(i)]
            )
            for i in range(n)
        ]
        trees, masses = [x for x, _ in pairs], [w for _, w in pairs]
        assert sum(masses) == pytest.approx(n, abs=1e-12)
        assert torch.allclose(mean(trees), first, atol=1e-12, rtol=0)
    assert all(torch.allclose(flat(ratio(x, w)), first, atol=2e-2) for x, w in zip(trees, masses, strict=True))


# -- compressors -----------------------------------------------------------------------------------------------------


@given(name=st.sampled_from(NAMES), seed=st.integers(0, 99), fraction=st.floats(0.05, 1), bits=st.sampled_from([4, 8]))
@settings(max_examples=60, deadline=None)
def test_what_is_lost_is_less_than_what_was_sent(name: str, seed: int, fraction: float, bits: int) -> None:
    tree = models(1, seed)[0]
    packing = compressor(name, fraction, bits)
    found = packing.decode(packing.encode(tree, numpy.random.default_rng(seed)), tree)
    assert all(found[k].shape == t.shape for k, t in tree.items())
    for k, t in tree.items():
        assert float((found[k] - t).norm()) <= float(t.norm()) + 1e-12


def test_identity_and_a_whole_top_k_lose_nothing() -> None:
    tree, rng = models(1)[0], numpy.random.default_rng(0)
    for packing in (compressor("identity"), TopK(1.0)):
        assert torch.equal(flat(packing.decode(packing.encode(tree, rng), tree)), flat(tree))


def test_zeros_stay_zeros() -> None:
    tree = {"a": torch.zeros(5)}
    for name in NAMES:
        packing = compressor(name, bits=4)
        found = packing.decode(packing.encode(tree, numpy.random.default_rng(0)), tree)
        assert torch.equal(found["a"], tree["a"]), name


def test_top_k_keeps_the_largest_and_the_sign_keeps_signs() -> None:
    tree, rng = {"a": torch.tensor([1.0, -4.0, 0.5, 3.0])}, numpy.random.default_rng(0)
    top, sign = TopK(0.5), Sign()
    assert top.decode(top.encode(tree, rng), tree)["a"].tolist() == [0.0, -4.0, 0.0, 3.0]
    assert sign.decode(sign.encode(tree, rng), tree)["a"].tolist() == [2.125, -2.125, 2.125, 2.125]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_quantiser_is_right_on_average(bits: int) -> None:
    tree, packing = {"a": torch.linspace(-1, 1, 7)}, compressor("quantise", bits=bits)
    rng = numpy.random.default_rng(0)
    draws = [packing.decode(packing.encode(tree, rng), tree)["a"] for _ in range(2000)]
    assert torch.allclose(torch.stack(draws).mean(0), tree["a"], atol=0.01)


@pytest.mark.parametrize(("name", "bytes_"), [("sign", 125 + 4), ("quantise", 1000 + 4), ("top-k", 100 * 8)])
def test_codes_are_as_small_as_they_say(name: str, bytes_: int) -> None:
    sent = compressor(name, fraction=0.1).encode({"a": torch.randn(1000)}, numpy.random.default_rng(0))
    assert sum(t.numel() * t.element_size() for t in sent.values()) == bytes_


@pytest.mark.parametrize("name", NAMES)
def test_a_code_that_cannot_be_is_refused(name: str) -> None:
    tree, packing = models(1, dtype=torch.float32)[0], compressor(name, 0.5)
    sent = packing.encode(tree, numpy.random.default_rng(0))
    key = next(iter(sent))
    with pytest.raises(UploadRejected):
        packing.decode({k: t for k, t in sent.items() if k != key}, tree)
    with pytest.raises(UploadRejected):
        packing.decode({**sent, key: torch.cat([sent[key].flatten()] * 2)}, tree)


def test_places_that_are_outside_or_twice_or_too_many_are_refused() -> None:
    tree = {"a": torch.randn(4)}
    for places in ([0, 9], [-1, 2], [1, 1], [2, 1], [0], [0, 1, 2]):
        sent = {"places.a": torch.tensor(places, dtype=torch.int32), "values.a": torch.ones(len(places))}
        with pytest.raises(UploadRejected, match="2 ascending places of 4"):
            TopK(0.5).decode(sent, tree)
    with pytest.raises(ConfigError, match=r"no compressor 'topk'.*'top-k'"):
        compressor("topk")


# -- public copies ---------------------------------------------------------------------------------------------------


def gossip(trees: list[Tensors], copies: list[PublicCopies], graph: Graph, gamma: float, round: int) -> list[Tensors]:
    """One round of CHOCO among peers that are all there."""
    weights, rng = metropolis(graph), numpy.random.default_rng(round)
    sent = [held.say(x, round, rng) for held, x in zip(copies, trees, strict=True)]
    return [
        choco(
            x,
            copies[i].of(str(i)),
            [(weights[i, j], copies[i].hear(str(j), sent[j], False, round)) for j in graph.senders(i)],
            gamma,
        )
        for i, x in enumerate(trees)
    ]


def holders(n: int, packing: Compressor, first: Tensors) -> list[PublicCopies]:
    return [PublicCopies(str(i), first, None, None, packing) for i in range(n)]


def test_choco_with_identity_and_gamma_one_is_plain_gossip() -> None:
    first, trees = models(1, 9)[0], models(6)
    copies, plain = holders(6, compressor("identity"), first), trees
    for number in range(1, 6):
        trees, plain = gossip(trees, copies, ring(6), 1.0, number), mixed(plain, ring(6))
        assert all(torch.allclose(flat(a), flat(b), atol=1e-12) for a, b in zip(trees, plain, strict=True))


@pytest.mark.parametrize(("name", "gamma"), [("top-k", 0.3), ("sign", 0.4), ("quantise", 0.9)])
def test_choco_agrees_keeps_the_mean_and_all_copies_are_the_same(name: str, gamma: float) -> None:
    trees = models(6)
    copies, before = holders(6, compressor(name, 0.2), models(1, 9)[0]), mean(trees)
    apart = torch.stack([flat(t) for t in trees]).std(0).norm()
    for number in range(1, 201):
        trees = gossip(trees, copies, ring(6), gamma, number)
    assert torch.allclose(mean(trees), before, atol=1e-12, rtol=0)
    assert torch.stack([flat(t) for t in trees]).std(0).norm() < 0.02 * apart
    for i, held in enumerate(copies):
        for j in ring(6).sends[i]:
            assert torch.equal(flat(held.of(str(j))), flat(copies[j].of(str(j)))) and held.tags[str(j)] == 200


def test_a_missed_message_is_noticed_and_the_whole_copy_mends_it() -> None:
    first, packing, rng = models(1, 9)[0], TopK(0.2), numpy.random.default_rng(0)
    owner, reader = (PublicCopies(name, first, None, None, packing) for name in "ab")
    assert owner.behind({"b": reader.tags}) == []
    owner.say(models(1)[0], 1, rng)  # lost on its way
    assert owner.behind({"b": reader.tags}) == ["b"]
    owner.say(models(1)[0], 2, rng)
    reader.hear("a", owner.of("a"), True, 2)
    assert owner.behind({"b": reader.tags}) == [] and torch.equal(flat(reader.of("a")), flat(owner.of("a")))


def test_a_round_undone_at_its_owner_is_noticed() -> None:
    first, packing, rng = models(1, 9)[0], TopK(0.2), numpy.random.default_rng(0)
    owner, reader = (PublicCopies(name, first, None, None, packing) for name in "ab")
    kept, tags = dict(owner.tensors), dict(owner.tags)
    reader.hear("a", owner.say(models(1)[0], 1, rng), False, 1)
    owner = PublicCopies("a", first, kept, tags, packing)  # its turn was rolled back
    assert owner.behind({"b": reader.tags}) == ["b"]
    owner.say(models(1)[0], 2, rng)  # while b is away: as many changes as b has seen, and not the same
    assert owner.behind({"b": reader.tags}) == ["b"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_and_the_copy_stays(bad: float) -> None:
    first = models(1)[0]
    held = PublicCopies("a", first, None, None, compressor("identity"))
    poison = {**first, "b": torch.full((7,), bad, dtype=torch.float64)}
    for whole in (True, False):
        with pytest.raises(UploadRejected, match="'b' sent a value that is not finite"):
            held.hear("b", poison, whole, 1)
    assert torch.equal(flat(held.of("b")), flat(first)) and "b" not in held.tags
    with pytest.raises(UploadRejected, match="not finite in 'b'"):
        checked(poison, first, "c")
    with pytest.raises(UploadRejected, match="in shape"):
        checked({**first, "b": torch.zeros(3)}, first, "c")


# -- rings -----------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 9), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_a_ring_gives_everybody_the_mean_in_the_same_bits(n: int, seed: int) -> None:
    trees = models(n, seed)
    rings, numbers = [RingMean(tree, i, n) for i, tree in enumerate(trees)], 0
    for hop in range(2 * (n - 1)):
        sent = [place.outgoing(hop) for place in rings]
        numbers += sum(chunk.numel() for chunk in sent)
        for i, place in enumerate(rings):
            place.accept(hop, sent[i - 1])
    found = [place.result() for place in rings]
    assert numbers == 2 * (n - 1) * len(flat(trees[0])), "over all peers; 2 (n - 1) / n of the model each"
    assert all(torch.allclose(flat(tree), mean(trees), atol=1e-12) for tree in found)
    assert all(torch.equal(flat(tree), flat(found[0])) for tree in found)
    assert all(tree["a"].shape == (3, 5) for tree in found)


def test_a_bad_chunk_is_refused() -> None:
    place = RingMean({"a": torch.zeros(4)}, 0, 2)
    for chunk in (torch.zeros(3), torch.tensor([float("nan"), 0.0])):
        with pytest.raises(UploadRejected, match="before in the ring"):
            place.accept(0, chunk)


def test_the_average_and_the_spread() -> None:
    trees, agreement = models(7), Agreement()
    for tree in trees:
        agreement.add(tree)
    rows = torch.stack([flat(tree) for tree in trees])
    assert torch.allclose(flat(agreement.mean(trees[0])), rows.mean(0), atol=1e-12)
    distance = (rows - rows.mean(0)).square().sum(1).mean().sqrt()
    assert agreement.spread == pytest.approx(float(distance / rows.mean(0).norm()), rel=1e-9)
    alone = Agreement()
    alone.add(trees[0])
    assert alone.spread == 0.0 and Agreement().spread == 0.0
