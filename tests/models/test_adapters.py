"""Grouped adapters: what each kind computes, and that the base model is never touched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedllm.core.errors import ConfigError, ModelError
from fedllm.core.tensors import Tensors, finite
from fedllm.core.train import Train
from fedllm.core.work import Fit, Generate, Score
from fedllm.engine.job import Job
from fedllm.engine.together import run_together
from fedllm.models.adapters.attach import Adapted
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import Loaded, load_model
from fedllm.models.settings import ModelSettings
from fedllm.models.toy import toy_model
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

PLACES = {  # a family, and what it is loaded as, for each kind of adapter
    "lora": ("llama", "causal-lm"),
    "ia3": ("llama", "causal-lm"),
    "prompt": ("qwen", "causal-lm"),
    "prefix": ("llama", "causal-lm"),
    "bottleneck": ("gpt2", "causal-lm"),
    "bitfit": ("gpt2", "causal-lm"),
    "head": ("bert", "sequence-classification"),
    "full": ("llama", "causal-lm"),
}
ROWS = [{"instruction": "say", "response": text} for text in ("yes", "no it is not", "the city")]
CLASSES = [{"text": row["response"], "label": "ab"[place % 2]} for place, row in enumerate(ROWS)]
TRAIN = Train(steps=2, batch_size=2, lr=0.05)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(family: str, kind: str = "causal-lm", **options: Any) -> Loaded:
    labels = ["a", "b"] if kind.endswith("classification") else None
    return load_model(ModelSettings(name=f"toy:{family}", device="cpu", **options), kind, labels)  # type: ignore[arg-type]


def put(kind: str, family: str = "", task: str = "", **options: Any) -> Adapted:
    place = PLACES[kind]
    loaded = toy_model(family or place[0], kind=task or place[1])  # type: ignore[arg-type]
    uneven(loaded)
    return Adapted(loaded, AdapterSettings(kind=kind, rank=4, tokens=3, width=5, **options), seed=3)  # type: ignore[arg-type]


def uneven(loaded: Loaded) -> None:
    """Move the biases of a new model away from zero."""
    stream = torch.Generator().manual_seed(2)
    for name, parameter in loaded.model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=stream)


def learner_on(loaded: Loaded, kind: str, **options: Any) -> TransformerLearner:
    classes = loaded.kind == "sequence-classification"
    task = TaskSettings(kind=loaded.kind, template="plain", max_length=64)  # type: ignore[arg-type]
    adapter = AdapterSettings(kind=kind, rank=4, tokens=3, width=5, **options)  # type: ignore[arg-type]
    return TransformerLearner(loaded, task, adapter, ["a", "b"] if classes else None, seed=3)


def ask(learner: TransformerLearner, request: Any, client: str = "c0") -> Any:
    held = learner.prepare(CLASSES if learner.loaded.kind == "sequence-classification" else ROWS)
    return run_together(learner, [Job(request, client, 5, 1, 1, lambda split: held, {})])[0]


def shaken(params: Tensors, seed: int = 0, size: float = 0.05) -> Tensors:
    """`params` moved at random, so that nothing is zero or one by accident."""
    stream = torch.Generator().manual_seed(seed)
    return {name: t + size * torch.randn(t.shape, generator=stream) for name, t in params.items()}


def stacked(*trees: Tensors) -> Tensors:
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def inputs(rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    ids = 20 + torch.arange(rows * length).view(rows, length) * 13 % 300
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(adapted: Adapted, params: Tensors | None, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad(), adapted.using(params):
        return adapted.call(batch).logits


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# --- the base model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLACES)
def test_the_base_model_is_the_same_before_and_after(kind: str):
    family, task = PLACES[kind]
    loaded = load(family, task)
    before, plain = digest(loaded.model), loaded.model(**inputs()).logits.detach()
    learner = learner_on(loaded, kind)
    report = ask(learner, Fit(learner.initial(), TRAIN))
    for request in (Score(report.params), Score(None)):
        ask(learner, request)
    if task == "causal-lm":
        ask(learner, Generate(report.params, ("say",), 3))
    assert digest(loaded.model) == before
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in loaded.model.parameters())
    assert torch.equal(logits(learner.adapted, None, inputs()), plain)
    changed = logits(learner.adapted, stacked(report.params), inputs())
    changed = changed[:, -plain.shape[1] :] if plain.dim() == 3 else changed
    assert not torch.allclose(changed, plain, atol=1e-4), "the adapter acts"


@pytest.mark.parametrize("kind", [kind for kind in PLACES if kind not in ("prompt", "prefix", "full")])
def test_a_removed_adapter_acts_no_more(kind: str):
    adapted = put(kind)
    params = stacked(shaken(adapted.initial()))
    plain = logits(adapted, None, inputs())
    assert not torch.equal(logits(adapted, params, inputs()), plain)
    adapted.remove()
    assert torch.equal(logits(adapted, params, inputs()), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in adapted.model.modules())


@pytest.mark.parametrize("kind", ["lora", "ia3", "bottleneck", "bitfit", "head", "full"])
def test_the_first_values_change_nothing(kind: str):
    adapted = put(kind)
    plain = logits(adapted, None, inputs())
    assert torch.allclose(logits(adapted, stacked(adapted.initial()), inputs()), plain, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "full", "prompt"])
def test_the_base_comes_back_after_an_error(kind: str):
    adapted = put(kind)
    plain, before = logits(adapted, None, inputs()), digest(adapted.model)
    with pytest.raises(ZeroDivisionError), adapted.using(stacked(shaken(adapted.initial()))):
        _ = 1 / 0
    assert torch.equal(logits(adapted, None, inputs()), plain) and digest(adapted.model) == before


@pytest.mark.parametrize("kind", ["lora", "ia3", "bottleneck", "full"])
def test_training_mode_makes_no_difference(kind: str):
    loaded = load(*PLACES[kind])
    learner = learner_on(loaded, kind)
    reports = []
    for mode in (False, True):
        loaded.model.train(mode)
        reports.append(ask(learner, Fit(learner.initial(), TRAIN)))
        assert loaded.model.training is mode
    assert all(torch.equal(reports[0].params[name], reports[1].params[name]) for name in reports[0].params)


def test_first_values_follow_from_the_seed_and_the_name():
    one, same, other = (
        Adapted(toy_model("llama"), AdapterSettings(rank=4), seed).initial() for seed in (1, 1, 2)
    )  # fmt: skip
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = "model.layers.0.self_attn.q_proj.lora_A"
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one[name.replace("layers.0", "layers.1")])
    assert one[name].abs().max() <= 64**-0.5 and one[name].std() > 0.5 * (64 * 3) ** -0.5
    fewer = Adapted(toy_model("llama"), AdapterSettings(rank=4, targets="q_proj"), 1).initial()
    assert torch.equal(one[name], fewer[name]), "other targets do not change a layer's first values"
    one[name].zero_()
    assert Adapted(toy_model("llama"), AdapterSettings(rank=4), 1).initial()[name].any()


# --- what each kind computes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_is_w_plus_scaled_b_a_for_each_client(family: str, dtype: torch.dtype, off: float):
    adapted = put("lora", family, dropout=0.5)
    adapted.model.to(dtype)
    name = {"llama": "model.layers.1.self_attn.v_proj", "gpt2": "transformer.h.1.attn.c_attn"}[family]
    trees = [shaken(adapted.initial(), k) for k in range(3)]
    stream = torch.Generator().manual_seed(9)
    layer, x = adapted.model.get_submodule(name), torch.randn(6, 5, 64, generator=stream).to(dtype)
    with torch.no_grad():
        plain = layer(x)
        with adapted.using(stacked(*trees)):
            found = layer(x)
    for k, tree in enumerate(trees):
        part, low = slice(2 * k, 2 * k + 2), x[2 * k : 2 * k + 2].float() @ tree[f"{name}.lora_A"].T
        expected = plain[part].float() + 16 / 4 * low @ tree[f"{name}.lora_B"].T
        assert found.dtype == dtype and torch.allclose(found[part].float(), expected, atol=off, rtol=off)


def test_ia3_scales_outputs_and_the_input_of_down_projections():
    adapted = put("ia3")
    trees = [shaken(adapted.initial(), k) for k in range(2)]
    key, down = (adapted.model.get_submodule(f"model.layers.0.{n}") for n in ("self_attn.k_proj", "mlp.down_proj"))
    x, y = torch.randn(4, 3, 64), torch.randn(4, 3, 128)
    with torch.no_grad():
        expected_key, expected_down = [], []
        for k, tree in enumerate(trees):
            expected_key.append(key(x[2 * k : 2 * k + 2]) * tree["model.layers.0.self_attn.k_proj.ia3"])
            expected_down.append(down(y[2 * k : 2 * k + 2] * tree["model.layers.0.mlp.down_proj.ia3"]))
        with adapted.using(stacked(*trees)):
            assert torch.allclose(key(x), torch.cat(expected_key), atol=1e-6)
            assert torch.allclose(down(y), torch.cat(expected_down), atol=1e-6)


def test_a_bottleneck_adds_a_small_network_behind_the_feed_forward_block():
    adapted = put("bottleneck")
    trees, name = [shaken(adapted.initial(), k) for k in range(2)], "transformer.h.0.mlp.c_proj"
    layer, x = adapted.model.get_submodule(name), torch.randn(2, 3, 256)
    with torch.no_grad():
        plain = layer(x)
        with adapted.using(stacked(*trees)):
            found = layer(x)
    for k, tree in enumerate(trees):
        middle = functional.gelu(functional.linear(plain[k], tree[f"{name}.down.weight"], tree[f"{name}.down.bias"]))
        change = functional.linear(middle, tree[f"{name}.up.weight"], tree[f"{name}.up.bias"])
        assert torch.allclose(found[k], plain[k] + change, atol=1e-5)


@pytest.mark.parametrize("kind", ["bitfit", "head", "full"])
def test_bound_weights_act_as_if_they_were_the_models_own(kind: str):
    adapted = put(kind)
    tree = shaken(adapted.initial())
    found = logits(adapted, stacked(tree), inputs())
    with torch.no_grad():
        for name, value in tree.items():
            adapted.model.get_parameter(name).copy_(value)
    assert torch.allclose(found, logits(adapted, None, inputs()), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_prompt_is_vectors_in_front_of_the_embedded_text(family: str):
    task = "token-classification" if family == "bert" else "causal-lm"
    adapted = put("prompt", family, task)
    first, batch = adapted.initial(), inputs()
    trees = [{**first, "prompt": shaken(first, k)["prompt"]} for k in range(2)]
    found = logits(adapted, stacked(*trees), batch)
    assert adapted.offset == 3 and found.shape[1] == 7 + 3
    table = adapted.model.get_input_embeddings()
    for k, tree in enumerate(trees):
        vectors = torch.cat([tree["prompt"], table(batch["input_ids"][k])]).unsqueeze(0)
        expected = adapted.model(inputs_embeds=vectors, attention_mask=torch.ones(1, 10)).logits
        assert torch.allclose(found[k], expected[0], atol=1e-5)


def test_a_prompt_keeps_the_segments_of_a_pair_of_texts():
    adapted = put("prompt", "bert", "sequence-classification")
    params, batch = stacked(shaken(adapted.initial())), inputs(1)
    first = logits(adapted, params, {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])})
    second = logits(adapted, params, {**batch, "token_type_ids": torch.ones_like(batch["input_ids"])})
    assert torch.equal(first, logits(adapted, params, batch))
    assert not torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prefix_is_keys_and_values_of_every_layer(family: str):
    from transformers import DynamicCache

    adapted = put("prefix", family)
    trees, batch = [shaken(adapted.initial(), k) for k in range(2)], inputs()
    assert trees[0]["prefix.0.key"].shape == ((2 if family == "llama" else 4), 3, 16)
    found = logits(adapted, stacked(*trees), batch)
    for k, tree in enumerate(trees):
        cache = DynamicCache()
        for layer in range(2):
            cache.update(tree[f"prefix.{layer}.key"].unsqueeze(0), tree[f"prefix.{layer}.value"].unsqueeze(0), layer)
        alone = adapted.model(
            input_ids=batch["input_ids"][k : k + 1], attention_mask=torch.ones(1, 10), **adapted.cache(cache)
        )
        assert torch.allclose(found[k], alone.logits[0], atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in PLACES if kind != "full"])
def test_every_client_gets_its_own_adapter(kind: str):
    adapted = put(kind)
    trees, batch = [shaken(adapted.initial(), k) for k in range(3)], inputs(6)
    found = logits(adapted, stacked(*trees), batch)
    for k, tree in enumerate(trees):
        rows = slice(2 * k, 2 * k + 2)
        alone = logits(adapted, stacked(tree), {name: value[rows] for name, value in batch.items()})
        assert torch.allclose(found[rows], alone, atol=1e-5)
    assert not torch.allclose(found[:2], logits(adapted, stacked(*trees[::-1]), batch)[:2], atol=1e-3)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "family", "task"), [
    ("prompt", "t5", "seq2seq"), ("prompt", "llama", "sequence-classification"), ("prefix", "t5", "seq2seq"),
    ("prefix", "bert", "token-classification"), ("bitfit", "llama", "causal-lm"), ("bitfit", "t5", "seq2seq"),
    ("head", "llama", "causal-lm"),
])  # fmt: skip
def test_an_adapter_that_a_model_cannot_take_is_refused_with_another(kind: str, family: str, task: str):
    with pytest.raises(ModelError) as caught:
        put(kind, family, task)
    assert caught.value.action or caught.value.nearest


def test_unknown_targets_and_kinds_are_refused():
    with pytest.raises(ModelError, match="q_proj"):
        put("lora", targets="q_porj")
    with pytest.raises((ConfigError, ValueError)):
        AdapterSettings(kind="lra")  # type: ignore[arg-type]


def test_all_weights_hold_one_client_only():
    adapted = put("full")
    tree = adapted.initial()
    with pytest.raises(ModelError, match="2 clients"), adapted.using(stacked(tree, tree)):
        pass


def test_rows_that_do_not_lie_client_after_client_are_refused():
    adapted = put("lora")
    tree = adapted.initial()
    with pytest.raises(ModelError, match="cohort_width=1"):
        logits(adapted, stacked(tree, tree), inputs(3))


# --- dropout -----------------------------------------------------------------------------------------------------


def masks(adapted: Adapted, rows: int, length: int, seeds: list[int] | None, number: int = 0) -> torch.Tensor:
    """Which inputs of a layer survive: A and B are identities, so that the change is the dropped out input itself."""
    name = f"model.layers.{number}.self_attn.q_proj"
    eye = {n: torch.eye(*t.shape) for n, t in adapted.initial().items()}
    layer, x = adapted.model.get_submodule(name), torch.ones(rows, length, 64)
    with torch.no_grad(), adapted.using(stacked(*[eye] * (len(seeds) if seeds else 1)), seeds):
        found = layer(x)
    with torch.no_grad():
        return (found - layer(x))[..., :64] / (16 / 64)


def test_dropout_masks_are_a_function_of_seed_layer_and_row():
    adapted = Adapted(toy_model("llama"), AdapterSettings(rank=64, dropout=0.25), 0)
    found = masks(adapted, 4, 6, [11, 12])
    kept = found > 0.5
    assert torch.allclose(found[kept], torch.tensor(1 / 0.75), atol=1e-4) and found[~kept].abs().max() < 1e-4
    assert 0.65 < kept.float().mean() < 0.85
    assert torch.equal(kept, masks(adapted, 4, 6, [11, 12]) > 0.5), "the same seeds"
    assert not torch.equal(kept[:2], kept[2:]), "another client"
    assert not torch.equal(kept[0], kept[1]), "another row"
    assert not torch.equal(kept, masks(adapted, 4, 6, [11, 12], 1) > 0.5), "another layer"
    assert torch.equal(kept[2:], masks(adapted, 2, 6, [12]) > 0.5), "alone"
    longer = masks(adapted, 6, 9, [11, 12]) > 0.5
    assert torch.equal(kept[:2], longer[:2, :6]) and torch.equal(kept[2:], longer[3:5, :6]), "padding and more rows"
    assert torch.allclose(masks(adapted, 4, 6, None), torch.ones(4, 6, 64), atol=1e-4), "off without seeds"


# --- memory: checkpointing, bfloat16, quantised layers -----------------------------------------------------------


@pytest.mark.parametrize(("kind", "family", "dropout"), [
    ("lora", "llama", 0.0), ("lora", "llama", 0.3), ("lora", "gpt2", 0.3), ("ia3", "llama", 0.0),
    ("bottleneck", "gpt2", 0.0), ("bitfit", "gpt2", 0.0), ("prompt", "qwen", 0.0), ("full", "llama", 0.0),
])  # fmt: skip
def test_checkpointing_recomputes_and_changes_nothing(kind: str, family: str, dropout: float):
    reports, calls, texts = [], [], []
    for on in (False, True):
        loaded = load(family, gradient_checkpointing=on)
        learner = learner_on(loaded, kind, dropout=dropout)
        attention = next(m for n, m in loaded.model.named_modules() if n.endswith(("self_attn", "attn")))
        calls.append(0)
        attention.register_forward_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        reports.append(ask(learner, Fit(learner.initial(), TRAIN)))
        before = calls[-1]
        ask(learner, Score(reports[-1].params))
        assert calls[-1] == before + 1, "measuring computes once"
        texts.append(ask(learner, Generate(reports[0].params, ("say", "the city"), 4)))
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-6)
    for name, tensor in reports[0].params.items():
        assert torch.allclose(tensor, reports[1].params[name], atol=1e-6)
    assert calls[1] == calls[0] + 2 and texts[0] == texts[1]


def test_a_prefix_and_checkpointing_exclude_each_other():
    with pytest.raises(ModelError, match="gradient checkpointing"):
        learner_on(load("llama", gradient_checkpointing=True), "prefix")


@pytest.mark.parametrize("kind", PLACES)
def test_a_bfloat16_base_trains_float32_adapters(kind: str):
    family, task = PLACES[kind]
    learner = learner_on(load(family, task, dtype="bfloat16"), kind)
    before = digest(learner.loaded.model)
    report = ask(learner, Fit(learner.initial(), TRAIN))
    assert all(tensor.dtype == torch.float32 for tensor in report.params.values())
    assert finite(report.params) is None
    assert any((tensor != 0).any() for tensor in report.delta.values())
    assert digest(learner.loaded.model) == before
    assert ask(learner, Score(report.params)).counts["loss"] > 0
    assert not learner.notes


class Quantised(nn.Module):
    """A linear layer that keeps its weight as int8 numbers and a scale, as quantisation libraries do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight.to(x.dtype) * self.scale)


def quantised(family: str = "llama") -> Loaded:
    loaded = load(family)
    for name, module in list(loaded.model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            loaded.model.set_submodule(name, Quantised(module))
    return loaded


@pytest.mark.parametrize("kind", ["lora", "ia3", "bottleneck"])
def test_quantised_layers_take_adapters_and_stay_as_they_are(kind: str):
    loaded = quantised()
    learner = learner_on(loaded, kind)
    assert learner.adapted.model.get_submodule("model.layers.0.self_attn.q_proj").weight.dtype == torch.int8
    before, longer = digest(loaded.model), Train(steps=12, batch_size=3, lr=0.05)
    report = ask(learner, Fit(learner.initial(), longer))
    first, last = (ask(learner, Score(p)).counts["loss"] for p in (None, report.params))
    assert last < first - 1.0, "it learns"
    assert digest(loaded.model) == before


def test_all_weights_of_a_quantised_model_cannot_be_trained():
    loaded = load("llama")
    loaded.model.lm_head.register_parameter("codes", nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False))
    with pytest.raises(ModelError, match="not quantised"):
        learner_on(loaded, "full")
