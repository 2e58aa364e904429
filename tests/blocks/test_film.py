"""FILM: what embedding rows give away, searches against brute force, and sentences read from a memorising model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, permutations, product
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedllm.blocks.film import Bag, Scorer, _moved, bag, beam, recover, reorder, score  # pyright: ignore[reportPrivateUsage]
from fedllm.core.errors import ConfigError, DataError, ModelError, UploadRejected

SEEDS = range(6)
Ids = tuple[int, ...]


def rng(seed: int = 0) -> numpy.random.Generator:
    return numpy.random.default_rng(seed)


class Bigram:
    """A fixed transition matrix; the inner tensor is the matrix of logits. Counts what it is asked."""

    def __init__(self, seed: int, size: int = 8) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.logits = 2 * torch.randn(size, size, generator=draw, dtype=torch.float64)
        self.table = self.logits.log_softmax(1)
        self.asked: Counter[Ids] = Counter()
        self.calls = 0
        self.graded: Counter[Ids] = Counter()

    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.asked.update(map(tuple, ids.tolist()))
        return self.table[ids]

    def gradient_norm(self, ids: torch.Tensor) -> float:
        self.graded[tuple(ids.tolist())] += 1
        return self.norm(tuple(ids.tolist()))

    def norm(self, ids: Ids) -> float:
        one, two = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
        rows = self.table[one].exp() - functional.one_hot(two, len(self.table))
        return float(torch.zeros_like(self.table).index_add(0, one, rows / len(one)).norm())

    def sum(self, ids: Sequence[int]) -> float:
        return sum(float(self.table[one, two]) for one, two in pairwise(ids))


def of(*tokens: int) -> Bag:
    return Bag(list(tokens), [1.0] * len(tokens))


# -- the bag -----------------------------------------------------------------------------------------------------------

VOCABULARY, WIDTH, HEADS, LENGTH = 1000, 64, 4, 16


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.wide(self.norm2(x))


class Small(nn.Module):
    """GPT-2's architecture with 2 layers; its initial values, or torch's own where the layers are `wide`."""

    def __init__(self, tied: bool, vocabulary: int = VOCABULARY, wide: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)
        inner = [] if wide else [module for module in self.layers.modules() if isinstance(module, nn.Linear)]
        for module in (self.words, self.places, self.head, *inner):
            nn.init.normal_(module.weight, std=0.02)
        for module in inner:
            nn.init.zeros_(module.bias)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.words(ids) + self.places.weight[: ids.shape[1]])))

    def loss(self, ids: torch.Tensor, ignore: int = -100) -> torch.Tensor:
        logits = self(ids)[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=ignore)


def observed(tied: bool, sentences: int, seed: int, wide: bool = False) -> tuple[torch.Tensor, Small, torch.Tensor]:
    torch.manual_seed(seed)
    model, ids = Small(tied, wide=wide), torch.randint(VOCABULARY, (sentences, LENGTH))
    return torch.autograd.grad(model.loss(ids), model.words.weight)[0], model, ids


@pytest.mark.parametrize("sentences", [1, 16, 64])
def test_untied_rows_are_exactly_the_tokens_that_were_fed(sentences: int) -> None:
    for seed in range(2):
        grad, _, ids = observed(False, sentences, seed)
        found = bag(grad, cut="nonzero")
        fed, used = set(ids[:, :-1].flatten().tolist()), set(ids.flatten().tolist())
        assert set(found.tokens) == fed and len(found.tokens) == len(fed)
        assert used - fed == set(ids[:, -1].tolist()) - fed != set()  # last positions only: no loss, no row
        assert found.norms == sorted(found.norms, reverse=True)
        assert found.norms == pytest.approx(grad[found.tokens].double().norm(dim=1).tolist(), rel=1e-12)
        assert bag(-0.1 * grad, cut="nonzero").tokens == found.tokens


def test_weight_decay_moves_every_row_and_the_gap_still_tells() -> None:
    grad, model, ids = observed(False, 16, 0)
    change = grad + 1e-6 * model.words.weight.detach()
    assert len(bag(change, cut="nonzero").tokens) == VOCABULARY
    assert set(bag(change, cut="gap").tokens) == set(ids[:, :-1].flatten().tolist())


@pytest.mark.parametrize("sentences", [1, 16, 64])
def test_tied_rows_all_move_and_the_gap_tells_those_that_were_used(sentences: int) -> None:
    for seed in range(2):
        grad, _, ids = observed(True, sentences, seed)
        used = set(ids.flatten().tolist())
        assert len(bag(grad, cut="nonzero").tokens) == VOCABULARY
        assert set(bag(grad, cut="gap").tokens) == used == set(bag(grad, cut=len(used)).tokens)


def test_the_gap_of_a_tied_head_is_gone_where_hidden_states_are_alike() -> None:
    # wider layers make them alike: with as many positions as tokens, a row used once is a row that was predicted
    for seed in range(2):
        grad, _, ids = observed(True, 16, seed, wide=True)
        assert set(bag(grad, cut="gap").tokens) == set(ids.flatten().tolist())
        grad, _, ids = observed(True, 64, seed, wide=True)
        used = set(ids.flatten().tolist())
        assert len(bag(grad, cut="gap").tokens) < 0.05 * len(used)
        assert len(used - set(bag(grad, cut=len(used)).tokens)) > 0.1 * len(used)  # nor does their number help


def test_a_cut_takes_the_largest_rows_that_are_not_zero() -> None:
    grad = torch.zeros(7, 3)
    grad[1], grad[2], grad[4], grad[6] = 2.0, 1.9, 2.0, 0.01
    assert bag(grad, cut="nonzero").tokens == [1, 4, 2, 6]
    assert bag(grad, cut="gap").tokens == [1, 4, 2]
    assert [bag(grad, cut=n).tokens for n in (0, 1, 3, 7)] == [[], [1], [1, 4, 2], [1, 4, 2, 6]]
    assert bag(grad, cut="gap", exclude=[1, 2, 3, 4]).tokens == [6]
    assert bag(grad, cut="nonzero", exclude={4}).tokens == [1, 2, 6]
    assert bag(torch.ones(4, 2), cut="gap").tokens == [0, 1, 2, 3]
    tiny = torch.zeros(3, 2, dtype=torch.float64)
    tiny[1, 0] = 1e-300  # its square underflows
    assert bag(tiny, cut="nonzero").tokens == [1]
    for cut in ("nonzero", "gap", 3):
        assert bag(torch.zeros(5, 2), cut=cut) == Bag([], [])  # type: ignore[arg-type]


def test_bad_gradients_and_cuts_are_refused() -> None:
    for value in (math.nan, math.inf):
        grad = torch.ones(4, 2)
        grad[3, 1] = value
        with pytest.raises(UploadRejected, match="not finite"):
            bag(grad, cut="nonzero", exclude=[3])
    for wrong in (torch.ones(4), torch.ones(4, 2, dtype=torch.long), torch.ones(4, 2).to_sparse()):
        with pytest.raises(UploadRejected, match="Expected: dense floats"):
            bag(wrong, cut="nonzero")
    for cut in ("gaps", -1, True, 2.0):
        with pytest.raises(ConfigError, match="Allowed: nonzero, gap"):
            bag(torch.ones(4, 2), cut=cut)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Allowed: 0 to 3"):
        bag(torch.ones(4, 2), cut="gap", exclude=[4])
    for tokens, norms in (([1, 1], [1.0, 1.0]), ([-1], [1.0]), ([1], [])):
        with pytest.raises(DataError):
            Bag(tokens, norms)


# -- beam search -------------------------------------------------------------------------------------------------------


def free(**others: Any) -> dict[str, Any]:
    """Options under which the search is exhaustive."""
    return {"groups": 1, "diversity": 0.0, "no_repeat": 0, "beams": 5000, **others}


@pytest.mark.parametrize("prefix", [(), (7,), (6, 7)])
def test_enough_beams_find_every_ordering_of_the_bag_best_first(prefix: Ids) -> None:
    for seed in SEEDS:
        language = Bigram(seed)
        counts = {0: 1, 2: 2, 3: 1, 5: 2 if seed % 2 else 1}
        whole = [token for token, times in counts.items() for _ in range(times)]
        found = beam(language, of(*counts), (), **free(counts=counts, prefix=prefix))
        wanted = {ids: language.sum((*prefix[-1:], *ids)) for ids in set(permutations(whole))}
        assert {ids for ids, _ in found} == set(wanted)
        assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
        assert all(value == pytest.approx(wanted[ids], abs=1e-9) for ids, value in found)
        assert found[0].ids == max(wanted, key=lambda ids: wanted[ids])


def test_without_counts_all_sentences_of_the_length_are_searched() -> None:
    for seed in SEEDS:
        language = Bigram(seed)
        found = beam(language, of(1, 3, 4), [3, 6], length=4, ends={4}, **free(no_repeat=2))
        wanted = set()
        for ids in product((1, 3, 4), repeat=4):
            cut = ids[: ids.index(4) + 1] if 4 in ids else ids
            if cut[0] == 3 and len(set(pairwise(cut))) == len(cut) - 1:
                wanted.add(cut)
        assert {ids for ids, _ in found} == wanted


def test_counts_bigrams_starts_and_ends_hold_in_every_beam() -> None:
    for seed in range(20):
        draw = rng(seed)
        language = Bigram(seed, 12)
        tokens = draw.choice(12, 7, replace=False).tolist()
        counts = {token: int(draw.integers(1, 4)) for token in tokens}
        starts, ends, length = tokens[:2], set(tokens[5:6]), int(draw.integers(2, 12))
        found = beam(language, of(*tokens), starts, counts=counts, beams=6, groups=3, length=length, ends=ends)
        assert found and len({ids for ids, _ in found}) == len(found)
        for ids, value in found:
            assert ids[0] in starts and len(ids) <= length and not ends & set(ids[:-1])
            assert all(times <= counts[token] for token, times in Counter(ids).items())
            assert len(set(pairwise(ids))) == len(ids) - 1
            assert value == pytest.approx(language.sum(ids), abs=1e-9)
            if len(ids) < length and ids[-1] not in ends:  # nothing more was allowed
                after = [t for t in tokens if Counter(ids)[t] < counts[t] and (ids[-1], t) not in set(pairwise(ids))]
                assert not after
        assert found == beam(
            Bigram(seed, 12), of(*tokens), starts, counts=counts, beams=6, groups=3, length=length, ends=ends
        )


@pytest.mark.parametrize("size", [1, 3])
def test_n_grams_of_any_size_are_not_repeated(size: int) -> None:
    for ids, _ in beam(Bigram(0), of(0, 1, 2), (), no_repeat=size, length=12):
        grams = [ids[at : at + size] for at in range(len(ids) - size + 1)]
        assert len(set(grams)) == len(grams)


def test_groups_avoid_what_earlier_groups_chose_at_the_same_step() -> None:
    for seed, diversity in product(SEEDS, (0.0, 0.5, 1e6)):
        language, tokens, groups, length = Bigram(seed), (0, 1, 2, 3, 4), 3, 6
        wanted: list[list[int]] = [[7] for _ in range(groups)]  # one beam a group, from one start
        for _ in range(length - 1):
            chosen: Counter[int] = Counter()
            for ids in wanted:
                row = {t: float(language.table[ids[-1], t]) - diversity * chosen[t] for t in tokens}
                ids.append(max(row, key=lambda token: row[token]))
                chosen[ids[-1]] += 1
        given: dict[str, Any] = {"beams": groups, "groups": groups, "diversity": diversity, "no_repeat": 0}
        found = beam(language, of(*tokens, 7), [7], length=length, counts=dict.fromkeys(tokens, 99) | {7: 1}, **given)
        assert {ids for ids, _ in found} == {tuple(ids) for ids in wanted}
        assert all(value == pytest.approx(language.sum(ids), abs=1e-9) for ids, value in found)
        if diversity == 1e6:
            assert all(len(set(step)) == groups for step in list(zip(*wanted, strict=True))[1:])


def test_an_end_token_counts_only_among_the_best_choices_of_a_step() -> None:
    for seed in range(20):
        language, length = Bigram(seed), 6
        ids, wanted = [7], set[Ids]()
        while len(ids) < length:
            ranked = language.table[ids[-1], :5].argsort(descending=True).tolist()
            if ranked[0] < 2:
                wanted.add((*ids, ranked[0]))
            ids.append(next(token for token in ranked if token > 1 or len(ids) == length - 1))
        wanted.add(tuple(ids))
        options: dict[str, Any] = {
            "beams": 1,
            "groups": 1,
            "no_repeat": 0,
            "counts": dict.fromkeys(range(5), 9) | {7: 1},
        }
        found = beam(language, of(0, 1, 2, 3, 4, 7), [7], length=length, ends={0, 1}, **options)
        assert {one for one, _ in found} == wanted


def test_a_penalised_n_gram_costs_the_penalty_each_time() -> None:
    language, tokens = Bigram(3), (0, 1, 2, 3)
    grams: list[Ids] = [(0, 1), (2,), (3, 0, 1), (6, 6)]
    found = beam(language, of(*tokens), (), counts=dict.fromkeys(tokens, 1), penalised=grams, penalty=2.5, **free())
    assert len(found) == 24
    for ids, value in found:
        times = sum(ids[at : at + len(gram)] == gram for gram in grams for at in range(len(ids)))
        assert value == pytest.approx(language.sum(ids) - 2.5 * times, abs=1e-9)


def test_what_cannot_begin_or_go_on() -> None:
    language = Bigram(0)
    assert beam(language, of(), [1]) == [] and beam(language, of(), (), prefix=[7]) == []
    assert beam(language, of(1, 2), (), counts={1: 0, 2: 0}) == []
    assert beam(language, of(1, 2), (), length=1) == [((1,), 0.0), ((2,), 0.0)]
    assert beam(language, of(1, 2), [1], ends={1}) == [((1,), 0.0)]
    assert {ids[0] for ids, _ in beam(language, of(1, 2), [5], length=3)} == {1, 2}  # no start is in the bag
    assert {ids[0] for ids, _ in beam(language, of(1, 2), [1], counts={1: 0, 2: 3}, length=3)} == {2}
    language.table[1, 2] = -math.inf
    assert beam(language, of(1, 2), [1], counts={1: 1, 2: 1}) == [((1,), 0.0)]  # impossible, not merely unlikely
    assert beam(language, of(2), (), prefix=[1]) == []


def test_bad_beams_and_bad_languages_are_refused() -> None:
    language = Bigram(0)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"beams": 0}, "beams=0"),
        ({"groups": 0}, "groups=0"),
        ({"beams": 6, "groups": 4}, "groups divides beams"),
        ({"length": 0}, "length=0"),
        ({"no_repeat": -1}, "no_repeat=-1"),
        ({"diversity": math.nan}, "diversity=nan"),
        ({"penalty": -1.0}, "penalty=-1"),
        ({"counts": {1: 1}}, "Token 2 of the bag has no count"),
    )
    for given, said in wrong:
        with pytest.raises(ConfigError, match=said):
            beam(language, of(1, 2), (), **given)
    with pytest.raises(ModelError, match="holds token 9"):
        beam(language, of(1, 9), [1])
    for table, said in ((language.logits, "above 0"), (torch.full((8, 8), math.nan), "NaN")):
        language.table = table
        with pytest.raises(ModelError, match=said):
            beam(language, of(0, 1, 2, 3), ())
        with pytest.raises(ModelError, match=said):
            score(language, range(8), 1.0)
    language.table = torch.zeros(8)
    with pytest.raises(ModelError, match=r"Expected: \[2, 1, V\]"):
        beam(language, of(1, 2), ())


# -- score -------------------------------------------------------------------------------------------------------------


def by_hand(language: Bigram, ids: Ids, alpha: float, prefix: Ids = ()) -> float:
    chain = (*prefix[-1:], *ids)
    return alpha * math.exp(-language.sum(chain) / (len(chain) - 1)) + language.norm((*prefix, *ids))


@pytest.mark.parametrize("prefix", [(), (7,), (6, 7)])
def test_the_score_is_perplexity_and_norm_and_nothing_is_asked_twice(prefix: Ids) -> None:
    for seed in SEEDS:
        language = Bigram(seed)
        scorer = Scorer(language, 2.0, prefix)
        sentences = [tuple(rng(10 * seed + i).integers(0, 6, 2 + i % 4).tolist()) for i in range(60)]
        best = scorer.best(sentences)
        wanted = {ids: by_hand(language, ids, 2.0, prefix) for ids in sentences}
        assert best is not None and best.score == pytest.approx(min(wanted.values()), rel=1e-12)
        assert len(language.graded) < len(wanted)  # the perplexity alone told of the rest
        assert scorer.best(sentences, best.score) is None  # it must fall
        for ids in sentences:
            assert scorer.score(ids) == pytest.approx(wanted[ids], rel=1e-12)
        assert set(language.asked.values()) == set(language.graded.values()) == {1}
        assert score(language, list(sentences[0]), 2.0, prefix=prefix) == scorer.score(sentences[0])


def test_penalties_are_part_of_the_perplexity() -> None:
    language = Bigram(1)
    one, two = sorted([(0, 1, 2), (2, 1, 0)], key=lambda ids: by_hand(language, ids, 1.0))
    found = Scorer(language, 1.0).best([one, two], worse=[50.0, 0.0])
    assert found is not None and found.ids == two


def test_impossible_sentences_score_inf_and_bad_input_is_refused() -> None:
    language = Bigram(0)
    language.table[1, 2] = -math.inf
    assert score(language, [0, 1, 2], 1.0) == math.inf and not language.graded
    for ids, prefix in (([], [7]), ([1], []), ([], [])):
        with pytest.raises(DataError, match="no transition"):
            score(language, ids, 1.0, prefix=prefix)
    for alpha in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="alpha"):
            score(language, [1, 3], alpha)
    for norm in (math.nan, -1.0):
        language.norm = lambda ids, norm=norm: norm
        with pytest.raises(ModelError, match="norm"):
            score(language, [1, 3], 1.0)


# -- reordering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [(), (7,)])
def test_short_sentences_reach_the_best_ordering_by_phrases(prefix: Ids) -> None:
    for seed in SEEDS:
        language = Bigram(seed)
        wanted = min(by_hand(language, ids, 2.0, prefix) for ids in permutations(range(5)))
        for phase in ("swaps", "phrases"):
            given: dict[str, Any] = {"alpha": 2.0, "prefix": prefix, "patience": 20, phase: 0}
            found = reorder(language, range(5), rng=rng(seed), **given)
            assert sorted(found.ids) == [0, 1, 2, 3, 4]
            if phase == "swaps":  # all orderings are one 4-opt move away; swaps may end in a local optimum
                assert found.score == pytest.approx(wanted, rel=1e-12)
            assert found.score == pytest.approx(by_hand(language, found.ids, 2.0, prefix), rel=1e-12)


def test_the_score_never_rises_and_the_same_generator_gives_the_same_text() -> None:
    for seed in range(10):
        language = Bigram(seed, 20)
        ids = tuple(rng(seed).integers(0, 20, 2 + seed).tolist())
        spare = rng(seed + 100).integers(0, 20, 5).tolist() if seed % 2 else []
        given: dict[str, Any] = {"phrases": 10, "swaps": 10, "tries": 20, "spare": spare, "longest": 9}
        found = reorder(language, ids, rng=rng(seed), **given)
        before = score(language, ids, 10.0)
        assert found.score <= before and found.score == pytest.approx(by_hand(language, found.ids, 10.0), rel=1e-12)
        assert found.ids == ids if found.score == before else found.ids != ids
        assert not Counter(ids) - Counter(found.ids) and not Counter(found.ids) - Counter(ids) - Counter(spare)
        assert len(found.ids) <= max(len(ids), 9)
        assert found == reorder(Bigram(seed, 20), ids, rng=rng(seed), **given)


def test_phrases_are_cut_where_a_transition_is_improbable() -> None:
    ids, surprisals = tuple(range(12)), [0.5] * 11
    surprisals[5] = 20.0  # nats, of token 6
    found = _moved(ids, surprisals, False, 4000, rng())
    kept = [sum((i - 1, i) in set(pairwise(one)) for one in found) / len(found) for i in range(1, 12)]
    assert kept[5] < 0.3 < 0.6 < min(kept[:5] + kept[6:])
    assert all(sorted(one) == list(ids) for one in found) and len(set(found)) > 500
    assert found == _moved(ids, [9.0, *surprisals], False, 4000, rng())  # a prefix adds the first token's


def test_a_local_window_leaves_the_rest_alone() -> None:
    ids = tuple(range(12))
    moves = _moved(ids, [1.0] * 11, True, 2000, rng())
    spans = [[i for i in ids if one[i] != i] for one in moves]
    assert all(sorted(one) == list(ids) for one in moves)
    assert max(span[-1] - span[0] + 1 for span in spans if span) == len(ids) // 2
    assert {span[0] for span in spans if span} >= set(range(8)) and {span[-1] for span in spans if span} >= {11}


def test_a_missing_token_is_inserted_from_the_spare_ones() -> None:
    language = Bigram(0, 12)
    language.logits = torch.full((12, 12), -4.0, dtype=torch.float64)
    language.logits[range(11), range(1, 12)] = 4.0  # counts upwards
    language.table = language.logits.log_softmax(1)
    assert reorder(language, [3, 1, 2, 5], spare=[4, 9], rng=rng()).ids == (1, 2, 3, 4, 5)
    assert reorder(language, [3, 1, 2, 5], spare=[4, 9], rng=rng(), longest=4).ids == (1, 2, 3, 5)
    assert reorder(language, [4, 5, 6, 7, 1, 2, 3], rng=rng(), swaps=0).ids == (1, 2, 3, 4, 5, 6, 7)


def test_a_round_is_asked_for_at_once() -> None:
    language = Bigram(0, 30)
    reorder(language, range(20), rng=rng(), phrases=8, swaps=8, tries=50)
    assert len(language.asked) > 500 and language.calls <= 1 + 16


def test_what_cannot_be_reordered_comes_back_and_bad_options_are_refused() -> None:
    language = Bigram(0)
    assert reorder(language, [], rng=rng()) == ((), math.inf)
    assert reorder(language, [3], rng=rng()) == ((3,), math.inf)
    assert reorder(language, [3], rng=rng(), prefix=[1]).ids == (3,)
    assert sorted(reorder(language, [3, 4], rng=rng()).ids) == [3, 4]
    assert reorder(language, [1, 1, 1], rng=rng()).ids == (1, 1, 1)
    language.table[:] = -math.inf
    assert reorder(language, [3, 4, 5], rng=rng()) == ((3, 4, 5), math.inf)
    for name, value in (("phrases", -1), ("swaps", -1), ("tries", 0), ("patience", 0), ("longest", 0), ("alpha", 0)):
        with pytest.raises(ConfigError, match=name):
            given: dict[str, Any] = {name: value}
            reorder(language, [1, 2], rng=rng(), **given)


# -- the whole attack --------------------------------------------------------------------------------------------------


def chains(*sentences: Ids, size: int = 16) -> Bigram:
    """A language that has memorised sentences."""
    language = Bigram(0, size)
    language.logits = torch.full((size, size), -5.0, dtype=torch.float64)
    for sentence in sentences:
        for one, two in pairwise(sentence):
            language.logits[one, two] = 5.0
    language.table = language.logits.log_softmax(1)
    return language


def test_all_sentences_come_out_and_counts_hold_over_all_of_them() -> None:
    sentences = [(1, 2, 3, 4, 15), (5, 6, 7, 8, 15), (9, 10, 11, 15)]
    language, counts = chains(*sentences), Counter(token for ids in sentences for token in ids)
    given: dict[str, Any] = {"starts": [1, 5, 9], "ends": {15}, "phrases": 5, "swaps": 5}
    for known in (counts, None):
        found = recover(language, of(*counts), sentences=3, rng=rng(), counts=known, **given)
        assert sorted(map(tuple, found)) == sentences
    assert recover(language, of(*counts), sentences=9, rng=rng(), counts=counts, **given)[3:] == []  # all used up
    for seed in range(4):
        language = Bigram(seed, 16)
        found = recover(
            language, of(*counts), sentences=4, rng=rng(seed), counts=counts, inserts=seed % 2 == 0, length=6, **given
        )
        assert not Counter(token for ids in found for token in ids) - counts and all(len(ids) <= 6 for ids in found)
        repeated = {"counts": counts, "inserts": seed % 2 == 0, "length": 6}
        assert found == recover(Bigram(seed, 16), of(*counts), sentences=4, rng=rng(seed), **repeated, **given)


def test_a_prefix_is_no_part_of_the_result() -> None:
    sentences = [(0, 1, 2, 3, 15), (0, 4, 5, 15)]
    given: dict[str, Any] = {"sentences": 2, "starts": (), "ends": {15}, "phrases": 5, "swaps": 5}
    found = recover(chains(*sentences), of(1, 2, 3, 4, 5, 15), rng=rng(), prefix=[0], **given)
    assert sorted(map(tuple, found)) == [(1, 2, 3, 15), (4, 5, 15)]


def test_nothing_comes_of_nothing() -> None:
    language = Bigram(0)
    assert recover(language, of(), sentences=3, starts=[1], rng=rng()) == []
    assert recover(language, of(1, 2), sentences=0, starts=[1], rng=rng()) == []
    assert recover(language, of(1), sentences=1, starts=[1], counts={1: 1}, rng=rng()) == [[1]]
    for name, value in (("sentences", -1), ("gram", 0), ("beams", 3), ("tries", 0)):
        with pytest.raises(ConfigError, match=name):
            given: dict[str, Any] = {"sentences": 1, "starts": (), "rng": rng(), name: value}
            recover(language, of(1, 2), **given)


# -- the effect --------------------------------------------------------------------------------------------------------

KINDS = {"name": 30, "thing": 50, "does": 40, "like": 40, "place": 30}
FORMS = (
    "name does the like thing in place .",
    "name and name does a thing with like thing .",
    "name does a like thing with the thing in place .",
    "name does the thing and does the like thing .",
)
PLAIN = ["the", "a", "in", "with", "and", "."]
WORDS = ["pad", "eos", *PLAIN, *(f"{kind}{i}" for kind, count in KINDS.items() for i in range(count))]
PAD, EOS, END = 0, 1, WORDS.index(".")
STARTS = [i for i, word in enumerate(WORDS) if word.startswith("name")]


class Gpt:
    """A small GPT-2 as a `Language`; its inner tensor is the last block's second LayerNorm weight."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Small(False, len(WORDS))

    def loss(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, rows))
        return self.model.loss(torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows]), PAD)

    def memorise(self, rows: list[Ids], steps: int, size: int) -> float:
        """Adam, written out: importing torch.optim takes as long as the training."""
        params = list(self.model.parameters())
        means, squares = ([torch.zeros_like(param) for param in params] for _ in range(2))
        for step in range(steps):
            at = step * size % len(rows)
            grads = torch.autograd.grad(self.loss(rows[at : at + size]), params)
            with torch.no_grad():
                for param, mean, square, grad in zip(params, means, squares, grads, strict=True):
                    mean.lerp_(grad, 0.1)
                    square.lerp_(grad**2, 0.001)
                    scale = (square / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
                    param.sub_(5e-3 / (1 - 0.9 ** (step + 1)) * mean / scale)
        return float(self.loss(rows).detach())

    def seen(self, rows: Sequence[Ids]) -> torch.Tensor:
        return torch.autograd.grad(self.loss(rows), self.model.words.weight)[0]

    @torch.no_grad()
    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).log_softmax(-1)

    def gradient_norm(self, ids: torch.Tensor) -> float:
        inner: Any = self.model.layers[-1].norm2
        return float(torch.autograd.grad(self.loss([ids.tolist()]), inner.weight)[0].norm())


def written(seed: int, count: int = 64) -> list[Ids]:
    """Sentences by template, each closed by the end token."""
    draw = rng(seed)

    def word(slot: str) -> int:
        return WORDS.index(f"{slot}{draw.integers(KINDS[slot])}" if slot in KINDS else slot)

    return [(*map(word, FORMS[i % len(FORMS)].split()), EOS) for i in range(count)]


def lcs_f1(one: Sequence[int], two: Sequence[int]) -> float:
    """ROUGE-L F1: 2 LCS / (lengths together)."""
    table = [[0] * (len(two) + 1) for _ in range(len(one) + 1)]
    for (i, x), (j, y) in product(enumerate(one), enumerate(two)):
        table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return 2 * table[-1][-1] / (len(one) + len(two))


def rouge(found: Sequence[Sequence[int]], truth: Sequence[Ids]) -> float:
    """The mean over true sentences of the best match."""
    return sum(max((lcs_f1(ids, one) for one in found), default=0.0) for ids in truth) / len(truth)


def shuffled(truth: Sequence[Ids], draw: numpy.random.Generator) -> list[list[int]]:
    """The same tokens in random order, cut into sentences of the true lengths."""
    tokens = iter(draw.permutation([token for ids in truth for token in ids]).tolist())
    return [[next(tokens) for _ in ids] for ids in truth]


@pytest.mark.effect
def test_a_memorising_model_gives_sentences_away() -> None:
    rows = written(0)
    attacked, fresh = Gpt(0), Gpt(1)
    assert attacked.memorise(rows, steps=100, size=32) < 0.3
    values: dict[str, list[float]] = {"known": [], "unknown": [], "fresh": [], "random": []}
    for seed in range(4):
        picked = [rows[i] for i in rng(seed).choice(len(rows), 4, replace=False)]
        truth = [ids[:-1] for ids in picked]
        counts = Counter(token for ids in truth for token in ids)
        for name, language, known in (
            ("known", attacked, counts),
            ("unknown", attacked, None),
            ("fresh", fresh, counts),
        ):
            found = bag(language.seen(picked), cut="nonzero", exclude=[PAD])
            assert set(found.tokens) == set(counts)
            given: dict[str, Any] = {"phrases": 10, "swaps": 10, "tries": 20, "patience": 4, "length": 14, "beams": 8}
            texts = recover(
                language, found, sentences=4, starts=STARTS, ends={END}, counts=known, rng=rng(seed), **given
            )
            values[name].append(rouge(texts, truth))
        values["random"].append(float(numpy.mean([rouge(shuffled(truth, rng(i)), truth) for i in range(10)])))
    mean = {name: float(numpy.mean(found)) for name, found in values.items()}
    assert mean["known"] > mean["random"] + 0.35 and mean["known"] > mean["fresh"] + 0.35
    assert mean["unknown"] > mean["random"] + 0.25
