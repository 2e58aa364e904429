"""One query of a corrupted transformer: bins against theory, what is read, what stops it, and the client's guard."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedllm
from fedllm.blocks import decepticons as attack
from fedllm.blocks.decepticons import (
    Key,
    Layout,
    breached,
    corrupt,
    cuts,
    in_place,
    layout_of,
    leaked_tokens,
    read,
    suspicious,
)
from fedllm.core.errors import ConfigError, DataError, ModeConflict, ModelError, UploadRejected

V, D, T = 2000, 96, 16
Gradient = dict[str, torch.Tensor]


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gpt2(seed: int, activation: str = "relu") -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    off: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes: dict[str, Any] = {"vocab_size": V, "n_embd": D, "n_layer": 3, "n_head": 4, "n_inner": 384, "n_positions": 64}
    return GPT2LMHeadModel(
        GPT2Config(**sizes, **off, activation_function=activation, bos_token_id=0, eos_token_id=0)
    ).eval()


def bert(seed: int, activation: str = "gelu") -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = BertConfig(**sizes, intermediate_size=384, hidden_act=activation, max_position_embeddings=64)
    return BertForMaskedLM(config).eval()


def state_of(model: Any) -> Gradient:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def prepared(
    model: Any, family: str, activation: str, seed: int, length: int = T, **more: Any
) -> tuple[Gradient, Key, Layout]:
    """The corrupted state, loaded into the model, with its key and layout."""
    state = state_of(model)
    layout = layout_of({name: t.shape for name, t in state.items()}, family, activation)
    new, key = corrupt(state, layout, sequence=length, rng=draw(seed), **more)
    model.load_state_dict(new, strict=False)
    return new, key, layout


def gradient_of(model: Any, ids: torch.Tensor, labels: torch.Tensor | None = None) -> Gradient:
    model.zero_grad()
    model(input_ids=ids, labels=ids if labels is None else labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def text(seed: int, batch: int = 4, length: int = T) -> torch.Tensor:
    return torch.randint(V, (batch, length), generator=draw(seed))


# -- the imprint alone -------------------------------------------------------------------------------------------------


def imprint(tokens: int, bins: int, seed: int, width: int = 32) -> tuple[float, int, int]:
    """Share of Gaussian tokens read to 1e-6, those alone in their bin, and the wrong inputs among lone ones."""
    rng = draw(seed)
    inputs = torch.randn(tokens, width, generator=rng, dtype=torch.float64)
    m = torch.randn(width, generator=rng, dtype=torch.float64)
    m /= m.norm()
    weight = m.expand(bins, -1).clone().requires_grad_()
    bias = (-cuts(bins, 0.0, 1.0)).requires_grad_()
    upstream = torch.randn(tokens, 1, generator=rng, dtype=torch.float64)
    (torch.relu(inputs @ weight.T + bias) * upstream).sum().backward()
    assert weight.grad is not None and bias.grad is not None
    found, strength = breached(weight.grad, bias.grad)
    assert len(found) == len(strength) <= tokens
    exact = torch.cdist(inputs, found).amin(1) < 1e-6
    place = torch.bucketize(inputs @ m, cuts(bins, 0.0, 1.0))
    lone = torch.bincount(place, minlength=bins + 1)[place] == 1
    return float(exact.double().mean()), int(lone.sum()), int((lone & ~exact).sum())


@pytest.mark.parametrize(("tokens", "bins", "seeds"), [(32, 512, 40), (256, 512, 20), (256, 4608, 10)])
def test_the_share_of_tokens_alone_in_a_bin_is_that_of_theory(tokens: int, bins: int, seeds: int) -> None:
    shares = []
    for seed in range(seeds):
        share, lone, wrong = imprint(tokens, bins, seed)
        assert wrong == 0 and round(share * tokens) == lone
        shares.append(share)
    theory = (1 - 1 / bins) ** (tokens - 1)
    error = (2 * theory * (1 - theory) / (tokens * seeds)) ** 0.5  # tokens collide in pairs, hence the 2
    assert abs(sum(shares) / seeds - theory) < 4 * error


def test_bins_are_equally_likely() -> None:
    edges = cuts(8, 1.0, 2.0)
    assert edges[0] == 1.0 - 20.0 and edges[4] == 1.0 and bool((edges.diff() > 0).all())
    inside = torch.special.ndtr((edges[1:] - 1.0) / 2.0).diff()
    assert torch.allclose(inside, torch.full((6,), 1 / 8, dtype=torch.float64))


# -- corrupt -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "model"), [("gpt2", gpt2), ("bert", bert)])
def test_corrupting_keeps_shapes_and_the_original_and_makes_rows_equal(family: str, model: Any) -> None:
    built = model(0, "relu")
    before = state_of(built)
    layout = layout_of({name: t.shape for name, t in before.items()}, family, "relu")
    kept = {name: t.clone() for name, t in before.items()}
    new, key = corrupt(before, layout, sequence=T, rng=draw(0))
    assert all(torch.equal(before[name], kept[name]) for name in kept)
    assert {n: (t.shape, t.dtype) for n, t in new.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert key.blocks == ((0, 1, 2) if family == "gpt2" else (0, 1))
    edges = []
    for i in key.blocks:
        linear = layout.blocks[i].ffn_in
        rows = new[linear.weight].T if linear.transposed else new[linear.weight]
        assert torch.equal(rows, rows[:1].expand_as(rows)) and rows[0, : key.tag + 1].count_nonzero() == 0
        assert rows[0, -1] == 0 and float(rows[0].norm()) == pytest.approx(1, abs=1e-6)
        edges.append(-new[linear.bias])
        out = layout.blocks[i].ffn_out
        sent = new[out.weight].T if out.transposed else new[out.weight]
        assert not sent[:-1].any() and bool((sent[-1] > 0).all())
    assert all(bool((edge.diff() > 0).all()) for edge in edges)
    assert all(left[-1] == right[0] for left, right in pairwise(edges))
    again, _ = corrupt(before, layout, sequence=T, rng=draw(0))
    assert all(torch.equal(again[name], new[name]) for name in new)


@pytest.mark.parametrize(("family", "model"), [("gpt2", gpt2), ("bert", bert)])
def test_the_inputs_computed_are_those_of_the_model(family: str, model: Any) -> None:
    built = model(1, "relu")
    _, plain, layout = prepared(built, family, "relu", 7)

    def measured(state: Gradient, ids: torch.Tensor) -> torch.Tensor:
        built.load_state_dict(state, strict=False)
        return hooked(built, layout, ids)[0]

    fresh = model(1, "relu")
    asked, key = corrupt(state_of(fresh), layout, sequence=T, rng=draw(7), statistics=measured)
    assert key.mean == pytest.approx(plain.mean, abs=1e-4) and key.spread == pytest.approx(plain.spread, abs=1e-4)
    assert suspicious(asked) is not None


def test_a_tied_head_follows_its_embedding() -> None:
    for family, model in (("gpt2", gpt2(0)), ("bert", bert(0))):
        state = model.state_dict()
        layout = layout_of({name: t.shape for name, t in state.items()}, family)
        new, _ = corrupt(state, layout, sequence=T, rng=draw(0))
        tied = "lm_head.weight" if family == "gpt2" else "cls.predictions.decoder.weight"
        assert torch.equal(new[tied], new[layout.token]) and not torch.equal(new[tied], state[tied])


def hooked(model: Any, layout: Layout, ids: torch.Tensor) -> list[torch.Tensor]:
    """The FFN inputs [n T, d] of every block."""
    seen: list[torch.Tensor] = []
    modules = [model.get_submodule(block.ffn_in.weight.removesuffix(".weight")) for block in layout.blocks]
    hooks = [m.register_forward_hook(lambda _m, args, _out: seen.append(args[0].detach())) for m in modules]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return [x.flatten(0, -2) for x in seen]


def test_a_lone_token_is_its_ffn_input_to_1e_6() -> None:
    model = gpt2(2).double()
    _, key, layout = prepared(model, "gpt2", "relu", 2)
    ids = text(3)
    gradient, inputs = gradient_of(model, ids), hooked(model, layout, ids)
    exact = 0
    for i, inside in zip(key.blocks, inputs, strict=True):
        linear = layout.blocks[i].ffn_in
        found, _ = breached(gradient[linear.weight].T, gradient[linear.bias], i == key.blocks[-1])
        place = torch.bucketize(inside @ state_of(model)[linear.weight][:, 0], -state_of(model)[linear.bias])
        place[T - 1 :: T] = -1  # no loss depends on the last position
        for bin_ in range(1, 384 + (i == key.blocks[-1])):
            here = inside[place == bin_]
            if len(here) == 1:
                assert torch.cdist(here, found).min() < 1e-6
                exact += 1
    assert exact > 45


# -- read --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "activation"), [(0, "relu"), (1, "relu"), (2, "gelu_new")])
def test_gpt2_is_read_in_place_and_scaling_does_not_stop_it(seed: int, activation: str) -> None:
    model, ids = gpt2(seed, activation), text(seed + 100)
    _, key, layout = prepared(model, "gpt2", activation, seed)
    gradient = gradient_of(model, ids)
    assert all(bool(torch.isfinite(t).all()) for t in gradient.values())
    assert set(leaked_tokens(gradient, layout, ids.numel()).tolist()) == set(ids.flatten().tolist())
    reading = read(gradient, key, layout, batch=4, length=T)
    assert reading.tokens.shape == reading.confidence.shape == (4, T) and reading.found >= 50
    assert in_place(reading.tokens, ids) > 0.9
    if activation == "relu":  # a GELU's gradients are too small beside its weights
        new = state_of(model)
        update = {name: (new[name] - t) - new[name] for name, t in gradient.items()}  # learning rate 1, rounded
        assert in_place(read({n: -t for n, t in update.items()}, key, layout, batch=4, length=T).tokens, ids) > 0.8
    clipped = {name: t * 1e-3 for name, t in gradient.items()}
    assert in_place(read(clipped, key, layout, batch=4, length=T).tokens, ids) > 0.9


def test_noise_and_frozen_ffns_stop_it() -> None:
    model, ids = gpt2(3), text(103)
    _, key, layout = prepared(model, "gpt2", "relu", 3)
    gradient = gradient_of(model, ids)
    norm = torch.cat([t.flatten() for t in gradient.values()]).norm()
    rng = draw(0)
    for deviation in (0.5 / 4, 0.01):  # noise multiplier 0.5 at batch 4, and far less; the gradient clipped to norm 1
        noisy = {n: t / norm + deviation * torch.randn(t.shape, generator=rng) for n, t in gradient.items()}
        reading = read(noisy, key, layout, batch=4, length=T)
        assert in_place(reading.tokens, ids) < 0.1 and reading.found <= 3
    frozen = {name: t for name, t in gradient.items() if ".mlp." not in name}
    for given in (frozen, {n: t if n in frozen else torch.zeros_like(t) for n, t in gradient.items()}):
        reading = read(given, key, layout, batch=4, length=T)
        assert reading.found == 0 and in_place(reading.tokens, ids) < 0.1
    bare = read({n: t for n, t in frozen.items() if "wte" not in n}, key, layout, batch=4, length=T)
    assert bare.found == 0 and bool((bare.tokens == -1).all()) and not bare.confidence.any()


def test_the_sum_of_two_clients_is_read_too() -> None:
    model, texts = gpt2(4), (text(104), text(105))
    _, key, layout = prepared(model, "gpt2", "relu", 4)
    one, two = (gradient_of(model, ids) for ids in texts)
    total = {name: one[name] + two[name] for name in one}
    assert in_place(read(total, key, layout, batch=8, length=T).tokens, torch.cat(texts)) > 0.85


def test_without_the_gradient_of_embeddings_the_bins_still_tell() -> None:
    model, ids = gpt2(5), text(106)
    _, key, layout = prepared(model, "gpt2", "relu", 5)
    gradient = {name: t for name, t in gradient_of(model, ids).items() if "wte" not in name}
    assert in_place(read(gradient, key, layout, batch=4, length=T).tokens, ids) > 0.8


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bert_is_read_in_place(activation: str) -> None:
    model, ids = bert(0, activation), text(107, 1, 32)
    _, key, layout = prepared(model, "bert", activation, 0, 32)
    masked = torch.rand(ids.shape, generator=draw(1)) < 0.15
    given = torch.where(masked, 3, ids)
    gradient = gradient_of(model, given, torch.where(masked, ids, -100))
    assert set(ids[masked].tolist()) <= set(leaked_tokens(gradient, layout, 32).tolist())
    reading = read(gradient, key, layout, batch=1, length=32)
    assert in_place(reading.tokens, given) > 0.85 and reading.found >= 26


def test_a_batch_that_is_claimed_too_small_keeps_the_best() -> None:
    model, ids = gpt2(6), text(108)
    _, key, layout = prepared(model, "gpt2", "relu", 6)
    reading = read(gradient_of(model, ids), key, layout, batch=2, length=8)
    assert reading.tokens.shape == (2, 8) and reading.found <= 16


def test_garbage_gives_few_hits_and_no_crash() -> None:
    model = gpt2(7)
    new, key, layout = prepared(model, "gpt2", "relu", 7)
    rng = draw(0)
    noise = {name: torch.randn(t.shape, generator=rng) for name, t in new.items()}
    zero = {name: torch.zeros_like(t) for name, t in new.items()}
    nan = {name: torch.full_like(t, float("nan")) for name, t in new.items()}
    huge = {name: torch.full_like(t, float("inf")) for name, t in new.items()}
    for garbage in (noise, zero, nan, huge, {}):
        reading = read(garbage, key, layout, batch=2, length=T)
        assert reading.found == 0 and reading.tokens.shape == (2, T)
        assert bool(((reading.confidence >= 0) & (reading.confidence <= 1)).all())
    half = gradient_of(model, text(1, 2))
    half[layout.blocks[0].ffn_in.weight][:, ::7] = float("nan")
    half[layout.token][5] = float("nan")
    assert read(half, key, layout, batch=2, length=T).found > 15


def test_equal_first_tokens_share_a_tag_and_are_still_split() -> None:
    tags = torch.randn(2, 6, generator=draw(0), dtype=torch.float64)[[0] * 8 + [0] * 8 + [1] * 5]
    tags = tags * torch.linspace(0.5, 2, 21, dtype=torch.float64)[:, None] + 0.3
    found = attack._sentences(tags, 3, 8)  # pyright: ignore[reportPrivateUsage]
    assert sorted(len(some) for some in found) == [5, 8, 8]
    assert {16, 17, 18, 19, 20} in [set(some.tolist()) for some in found]


def test_the_match_is_the_one_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = draw(0)
    inputs, tokens, positions = (torch.randn(n, 9, generator=rng, dtype=torch.float64) for n in (5, 30, 4))
    wanted = torch.tensor(
        [[[float(torch.corrcoef(torch.stack([u, t + p]))[0, 1]) for t in tokens] for p in positions] for u in inputs]
    )
    for cells in (attack.CELLS, 40):
        monkeypatch.setattr(attack, "CELLS", cells)
        score, which = attack._correlated(inputs, tokens, positions)  # pyright: ignore[reportPrivateUsage]
        assert torch.allclose(score.float(), wanted.amax(2), atol=1e-6) and torch.equal(which, wanted.argmax(2))


def test_in_place_pairs_sentences() -> None:
    truth = text(0, 3, 5)
    assert in_place(truth[[2, 0, 1]], truth) == 1.0
    assert in_place(torch.full_like(truth, -1), truth) == 0.0
    with pytest.raises(DataError, match="shape"):
        in_place(truth[:2], truth)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_layouts_with_and_without_the_leading_name_and_what_is_refused() -> None:
    from transformers import BertModel, GPT2Model

    for family, whole, inner in (("gpt2", gpt2(0), GPT2Model), ("bert", bert(0), BertModel)):
        shapes = {name: p.shape for name, p in whole.named_parameters()}
        lead = "transformer." if family == "gpt2" else "bert."
        bare = {name: p.shape for name, p in inner(whole.config).named_parameters()}
        one, two = layout_of(shapes, family), layout_of(bare, family)
        assert one.token == lead + two.token and len(one.blocks) == len(two.blocks) == 3
        assert one.blocks[2].ffn_in.weight == lead + two.blocks[2].ffn_in.weight
        broken = {n: s for n, s in shapes.items() if n != one.blocks[1].ffn_in.bias}
        with pytest.raises(ModelError, match=r"has no '.*bias'"):
            layout_of(broken, family)
        with pytest.raises(ModelError, match=r"in shape \(7,\)"):
            layout_of({**shapes, one.blocks[1].ffn_out.bias: (7,)}, family)
        with pytest.raises(ModelError, match="has no '"):
            layout_of({}, family)
        with pytest.raises(ModeConflict, match="activation 'tanh'"):
            layout_of(shapes, family, "tanh")
    for family in ("llama", "qwen2", "t5"):
        with pytest.raises(ModeConflict, match="positions"):
            layout_of({}, family)
    with pytest.raises(ModelError, match=r"no layout of 'gpt3'.*Did you mean 'gpt2'"):
        layout_of({}, "gpt3")


def test_what_cannot_be_corrupted_or_read_is_refused() -> None:
    model = gpt2(0)
    state = state_of(model)
    layout = layout_of({name: t.shape for name, t in state.items()}, "gpt2", "relu")
    token = layout.token

    def refused(error: type[Exception], words: str, changes: Gradient | None = None, **more: Any) -> None:
        given: dict[str, Any] = {"sequence": T, "rng": draw(0), **more}
        with pytest.raises(error, match=words):
            corrupt({**state, **(changes or {})}, layout, **given)

    refused(ConfigError, "sequence is 65", sequence=65)
    refused(ConfigError, "tag is 60", tag=60)
    refused(ConfigError, "tag is 1", tag=1)
    refused(ConfigError, "eps is 0", eps=0.0)
    refused(ModelError, "in shape", {token: state[token][:5]})
    refused(ModeConflict, "float16", {token: state[token].half()})
    refused(DataError, "NaN", {token: torch.full_like(state[token], float("nan"))})
    refused(DataError, "public tokens", public=torch.tensor([[V]]))
    refused(DataError, "public tokens", public=torch.zeros(2, T + 1, dtype=torch.long))
    refused(DataError, "FFN inputs", statistics=lambda _s, _i: torch.ones(3, 5))
    refused(DataError, "same <m, u>", statistics=lambda _s, _i: torch.ones(3, D))
    with pytest.raises(ModelError, match="state has no"):
        corrupt({}, layout, sequence=T, rng=draw(0))
    new, key = corrupt(state, layout, sequence=T, rng=draw(0), public=text(0, 8))
    with pytest.raises(UploadRejected, match="in shape"):
        read({token: new[token][:3]}, key, layout, batch=1, length=T)
    for batch, length in ((0, T), (1, T + 1), (1, 0)):
        with pytest.raises(ConfigError, match="batch is"):
            read({}, key, layout, batch=batch, length=length)


# -- guard -------------------------------------------------------------------------------------------------------------


def test_the_guard_flags_corrupted_states_and_no_honest_ones() -> None:
    for family, model in (("gpt2", gpt2(0)), ("bert", bert(0, "relu"))):
        honest = state_of(model)
        new, _, layout = prepared(model, family, "relu", 0)
        assert suspicious(honest) is None and suspicious(honest, layout) is None
        assert "rank 1" in str(suspicious(new)) and "rank 1" in str(suspicious(new, layout))
        assert suspicious(new, ["nothing"]) is None
        name = layout.blocks[2].ffn_in.weight
        one = {**honest, name: 3 * torch.randn(honest[name].shape[0], 1) * torch.ones(honest[name].shape)}
        assert name in str(suspicious(one)) and suspicious({n: t for n, t in one.items() if n != name}) is None
        bias = layout.blocks[0].query.bias
        assert "1.0e+08" in str(suspicious({**honest, bias: honest[bias] + 1e8}))
        assert "NaN" in str(suspicious({**honest, bias: honest[bias] * float("nan")}))


def test_trained_weights_and_adapters_pass() -> None:
    trained = load_file(Path(fedllm.__file__).parent / "models" / "fedllm_tiny" / "model.safetensors")
    assert suspicious(trained) is None
    rng = draw(0)
    a, b = torch.randn(8, 96, generator=rng), torch.randn(96, 1, generator=rng) * torch.randn(1, 8, generator=rng)
    ids = torch.arange(512)[None]
    assert suspicious({"lora_A": a, "lora_B": b, "zero": torch.zeros(96, 96), "ids": ids}) is None
    assert suspicious({}) is None


def test_the_share_of_the_first_direction_is_that_of_the_singular_values() -> None:
    for seed in range(20):
        rng = draw(seed)
        line = torch.randn(40, 1, generator=rng) * torch.randn(1, 30, generator=rng)
        matrix = line + 0.02 * torch.randn(40, 30, generator=rng)
        values = torch.linalg.svdvals(matrix).square()
        assert attack.top_share(matrix) == pytest.approx(float(values[0] / values.sum()), abs=1e-5)
        assert attack.top_share(line) == pytest.approx(1.0, abs=1e-6)
