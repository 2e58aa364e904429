"""A second, private LoRA, and the bridge beside the output layer: what they compute, where they lie, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.core.errors import ModelError
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import Fit, Score
from fedllm.engine.job import Job
from fedllm.engine.together import run_together
from fedllm.models.adapters.attach import PERSONAL, Adapted
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.structure import linears
from fedllm.models.toy import toy_model
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

Q = "model.layers.0.self_attn.q_proj"
ENDS = (".personal.lora_A", ".personal.lora_B")
PLACES = [
    ("llama", "causal-lm"),
    ("llama", "sequence-classification"),
    ("bert", "sequence-classification"),
    ("gpt2", "causal-lm"),
    ("t5", "seq2seq"),
]


def put(family: str = "llama", task: Any = "causal-lm", **options: Any) -> Adapted:
    torch.set_num_threads(1)
    return Adapted(toy_model(family, kind=task), AdapterSettings(**{"rank": 4, **options}), seed=3)  # type: ignore[arg-type]


def shaken(params: Tensors, seed: int = 0) -> Tensors:
    stream = torch.Generator().manual_seed(seed)
    return {name: t + 0.05 * torch.randn(t.shape, generator=stream) for name, t in params.items()}


def stacked(*trees: Tensors) -> Tensors:
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def inputs(family: str = "llama", rows: int = 2) -> dict[str, torch.Tensor]:
    ids = 20 + torch.arange(rows * 7).view(rows, 7) * 13 % 300
    extra = {"decoder_input_ids": ids} if family == "t5" else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}


def logits(adapted: Adapted, params: Tensors | None, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad(), adapted.using(params):
        return adapted.call(batch).logits


# --- the private LoRA --------------------------------------------------------------------------------------------


def test_the_private_lora_lies_on_the_layers_of_the_first_and_has_a_scale_of_its_own() -> None:
    adapted = put(personal=2, alpha=8.0, dropout=0.5)
    names = {n for n in adapted.initial() if n.endswith(ENDS)}
    assert {n.replace(".personal", "") for n in names} == set(adapted.initial()) - names
    tree = shaken(adapted.initial())
    layer, x = adapted.model.get_submodule(Q), torch.randn(2, 5, 64)
    with torch.no_grad():
        plain = layer(x)
        with adapted.using(stacked(tree)):
            found = layer(x)
    change = 2 * tree[f"{Q}.lora_B"] @ tree[f"{Q}.lora_A"]
    change = change + 4 * tree[f"{Q}.personal.lora_B"] @ tree[f"{Q}.personal.lora_A"]
    assert torch.allclose(found, plain + x @ change.T, atol=1e-4), "merged weights are the branches"


def test_the_private_lora_starts_at_zero_and_does_not_change_the_first() -> None:
    with_it, without = put(personal=2), put()
    assert all(torch.equal(with_it.initial()[n], t) for n, t in without.initial().items())
    assert not any(t.any() for n, t in with_it.initial().items() if n.endswith("personal.lora_B"))
    assert all(t.any() for n, t in with_it.initial().items() if n.endswith("personal.lora_A"))
    params = stacked(with_it.initial())
    assert torch.allclose(logits(with_it, params, inputs()), logits(with_it, None, inputs()), atol=1e-5)


def test_with_all_weights_it_lies_on_all_linear_layers() -> None:
    adapted = put(kind="full", personal=2)
    owners = {n.removesuffix(".personal.lora_A") for n in adapted.initial() if n.endswith(ENDS[0])}
    assert owners == set(linears(adapted.model)) and adapted.width_limit == 1
    some = put(kind="full", personal=2, targets="q_proj")
    assert sum(n.endswith(ENDS[0]) for n in some.initial()) == 2
    tree = shaken(adapted.initial())
    layer, x = adapted.model.get_submodule(Q), torch.randn(1, 5, 64)
    with torch.no_grad(), adapted.using(stacked(tree)):
        found = layer(x)
    merged = tree[f"{Q}.weight"] + 8 * tree[f"{Q}.personal.lora_B"] @ tree[f"{Q}.personal.lora_A"]
    assert torch.allclose(found, x @ merged.T, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "head", "full"])
def test_the_head_has_a_private_part_too(kind: str) -> None:
    adapted = put("bert", "sequence-classification", kind=kind, personal=2)
    assert {"classifier.weight", "classifier.personal.lora_A"} <= set(adapted.initial())
    if kind == "head":
        assert sum(n.endswith(ENDS[0]) for n in adapted.initial()) == 1
    tree, batch = shaken(adapted.initial()), inputs()
    with_it = logits(adapted, stacked(tree), batch)
    tree["classifier.personal.lora_B"] = torch.zeros_like(tree["classifier.personal.lora_B"])
    assert not torch.allclose(with_it, logits(adapted, stacked(tree), batch), atol=1e-4)


@pytest.mark.parametrize("kind", ["ia3", "prompt", "bottleneck"])
def test_kinds_without_layers_of_a_first_lora_are_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=rf"adapter\.personal=2 has no meaning for adapter\.kind={kind}"):
        put(kind=kind, personal=2)
    assert kind not in PERSONAL


# --- the bridge --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "task"), PLACES)
@pytest.mark.parametrize("width", [64, 24])
def test_a_bridge_adds_b_a_p_x_to_the_logits(family: str, task: str, width: int) -> None:
    adapted = put(family, task, bridge=3, bridge_width=width)
    tree, seen = shaken(adapted.initial()), []
    name = {"causal-lm": "lm_head", "seq2seq": "lm_head"}.get(task, "classifier" if family == "bert" else "score")
    layer = adapted.model.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    batch = inputs(family)
    found = logits(adapted, stacked(tree), batch)
    zero = {**tree, "bridge.lora_B": torch.zeros_like(tree["bridge.lora_B"])}
    change = found - logits(adapted, stacked(zero), batch)
    handle.remove()
    x = seen[0] @ tree["bridge.project"].T if width != 64 else seen[0]
    expected = x @ tree["bridge.lora_A"].T @ tree["bridge.lora_B"].T
    if expected.shape != change.shape:  # a decoder classifies at the last position
        expected = expected[:, -1]
    assert torch.allclose(change, expected, atol=1e-4) and expected.abs().max() > 1e-3


def test_a_bridge_has_the_same_names_and_shapes_whatever_the_model() -> None:
    found = []
    for family in ("llama", "bert", "gpt2"):
        first = put(family, "sequence-classification", bridge=3, bridge_width=24).initial()
        found.append({n: t for n, t in first.items() if n in ("bridge.lora_A", "bridge.lora_B")})
        assert first["bridge.project"].shape == (24, 64)
    for other in found[1:]:
        assert {n: t.shape for n, t in other.items()} == {"bridge.lora_A": (3, 24), "bridge.lora_B": (2, 3)}
        assert all(torch.equal(other[n], t) for n, t in found[0].items()), "alike at every client"


def test_the_map_to_the_common_width_keeps_the_size_of_features_and_is_absent_where_widths_agree() -> None:
    assert "bridge.project" not in put(bridge=3, bridge_width=64).initial()
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    mapped = x @ put(bridge=3, bridge_width=300).initial()["bridge.project"].T
    assert 0.8 < float(mapped.std()) < 1.2


@pytest.mark.parametrize(("family", "task"), PLACES)
def test_every_client_has_its_own_bridge(family: str, task: str) -> None:
    adapted = put(family, task, bridge=3, bridge_width=24)
    trees, batch = [shaken(adapted.initial(), k) for k in range(3)], inputs(family, 6)
    found = logits(adapted, stacked(*trees), batch)
    for k, tree in enumerate(trees):
        rows = slice(2 * k, 2 * k + 2)
        alone = logits(adapted, stacked(tree), {name: value[rows] for name, value in batch.items()})
        assert torch.allclose(found[rows], alone, atol=1e-4)


def test_chosen_positions_need_to_be_told_whose_they_are() -> None:
    adapted = put(bridge=3, bridge_width=24)
    trees = [shaken(adapted.initial(), k) for k in range(2)]
    x, rows = torch.randn(5, 64), torch.tensor([0, 1, 1, 1, 3])  # rows 0 and 1 are the first client's
    with torch.no_grad(), adapted.using(stacked(*trees)):
        with pytest.raises(ModelError, match="5 positions of 2 clients"):
            adapted.model.lm_head(x)
        with adapted.at(rows, 4):
            found = adapted.model.lm_head(x)
        with pytest.raises(ModelError, match="not whose"):
            adapted.model.lm_head(x)
    for k, part in ((0, slice(0, 4)), (1, slice(4, 5))):
        with torch.no_grad(), adapted.using(stacked(trees[k])):
            assert torch.allclose(found[part], adapted.model.lm_head(x[part]), atol=1e-5)


class Telling(TransformerLearner):
    """Says whose the positions are."""

    def _logits(self, batch: Any) -> Any:
        with self.adapted.at(batch.where[0], batch.inputs["input_ids"].shape[0]):
            return super()._logits(batch)


def test_language_models_train_their_bridges_in_one_pass() -> None:
    """Answers of unequal length: the output layer gets other numbers of positions from each client."""
    settings = AdapterSettings(rank=4, bridge=3, bridge_width=24)
    learner: Any = Telling(toy_model("llama"), TaskSettings(template="plain", max_length=64), settings, seed=3)
    rows = [{"instruction": "say", "response": text} for text in ("yes", "no it is not", "a long answer, longer yet")]
    held = [learner.prepare(rows[k:]) for k in range(2)]
    train = Train(steps=2, batch_size=1, lr=0.05)

    def ask(request: Any, *which: int) -> Any:
        jobs = [Job(request, f"c{k}", 5, 1, 1, lambda split, k=k: held[k], {}) for k in which]
        return run_together(learner, jobs)

    together = ask(Fit(learner.initial(), train), 0, 1)
    for k in range(2):
        (alone,) = ask(Fit(learner.initial(), train), k)
        assert all(torch.allclose(alone.params[n], together[k].params[n], atol=2e-5) for n in alone.params)
        assert alone.delta["bridge.lora_B"].any()
    assert ask(Score(together[0].params), 0)[0].counts["loss"] > 0


def test_a_model_without_an_output_layer_has_no_bridge() -> None:
    with pytest.raises(ModelError, match="cannot take a bridge"):
        put("clip", "dual-encoder", bridge=3)
