"""Head - logits a stretch at a time give the losses, slopes and counts of all at once, and never lie together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.core.tensors import Tensors
from fedllm.core.work import Example
from fedllm.models import structure
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings
from fedllm.models.toy import toy_model, toy_tokenizer
from fedllm.tasks import head
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

TEXTS = ("the film was great", "no", "every client trains it at home", "0 1 2 3 4", "the river is cold")
POSITIONS = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def capped(place: Path) -> None:
    """A Gemma 2, which caps its logits behind the output layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=64, vocab_size=384, final_logit_softcapping=0.5, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, query_pre_attn_scalar=16,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(place)
    toy_tokenizer("llama").save_pretrained(place)


def make(family: str, adapter: str, place: Path) -> TransformerLearner:
    kind = "masked-lm" if family == "bert" else "causal-lm"
    if family == "gemma":
        capped(place)
        loaded = load_model(ModelSettings(name=str(place), device="cpu"), "causal-lm")
    else:
        loaded = toy_model(family, kind=kind)  # type: ignore[arg-type]
    task = TaskSettings(kind=kind, template="plain", max_length=64)  # type: ignore[arg-type]
    return TransformerLearner(loaded, task, AdapterSettings(kind=adapter, rank=4, tokens=3), None, seed=1)  # type: ignore[arg-type]


def examples(learner: TransformerLearner) -> list[Example]:
    if learner.task.kind == "masked-lm":
        return learner.prepare([{"text": text} for text in TEXTS])
    return learner.prepare([{"instruction": text, "response": text[::-1]} for text in TEXTS])


def bound(learner: TransformerLearner, clients: int) -> Tensors:
    draw = torch.Generator().manual_seed(0)
    first = learner.initial()
    return {n: t + 0.1 * torch.randn(clients, *t.shape, generator=draw) for n, t in first.items()}


def slopes(learner: TransformerLearner, params: Tensors, groups: list[list[Example]]) -> tuple[torch.Tensor, Tensors]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
    weight = torch.arange(1.0, len(groups) + 1)
    with learner.using(leaves):
        found = learner.losses(groups)
        grads = torch.autograd.grad((found * weight).sum(), list(leaves.values()), allow_unused=True)
    return found.detach(), {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}


CASES = [
    ("llama", "lora"), ("llama", "prompt"), ("llama", "prefix"), ("llama", "ia3"), ("qwen", "lora"), ("gpt2", "lora"),
    ("gpt2", "prompt"), ("bert", "lora"), ("gemma", "lora"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "adapter"), CASES)
def test_stretches_give_the_same(family: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make(family, adapter, tmp_path)
    held = examples(learner)
    groups, params = [held[:2], held[2:3], held[3:]], bound(learner, 3)
    assert learner.head.stretched and not learner.head.splits(1000), "the model is small"
    whole, wanted = slopes(learner, params, groups)
    with torch.no_grad(), learner.using(params):
        counted = learner.counts_by_row(groups)

    width = learner.loaded.model.get_output_embeddings().weight.shape[0]
    monkeypatch.setattr(head, "STRETCH", POSITIONS * width + 1)
    sizes: list[int] = []
    learner.loaded.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: sizes.append(output.shape[:-1].numel())
    )
    assert learner.head.splits(POSITIONS + 1) and not learner.head.splits(POSITIONS)
    found, got = slopes(learner, params, groups)
    assert max(sizes) == POSITIONS and sum(sizes) == 1 + sum(example.targets for example in held)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    assert got.keys() == wanted.keys() and wanted
    for name in wanted:  # sums in another order: float32 rounds by the largest entry (11 in Gemma's), not by each
        size = max(1.0, float(wanted[name].abs().max()))
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6 * size)
    sizes.clear()
    with torch.no_grad(), learner.using(params):
        again = learner.counts_by_row(groups)
    assert max(sizes) == POSITIONS
    for one, other in zip(again, counted, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


SHAPES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "gptneox": ("GPTNeoX", {"use_parallel_residual": True}, True),
    "gemma2": ("Gemma2", {"head_dim": 16, "num_key_value_heads": 1, "query_pre_attn_scalar": 16}, True),
    "phi": ("Phi", {}, True),
    "falcon": ("Falcon", {}, True),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1}, True),
    "opt": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}, False),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_key_value_heads": 1}, False),
}
"""Families: classes, what their configuration needs, and whether the last feed-forward part is a module of its own."""


def of_family(name: str, place: Path, adapter: str = "lora", **more: Any) -> TransformerLearner:
    """A random model of another family, whose feed-forward parts count: their last layers are ten times as large."""
    import transformers

    prefix, options, _ = SHAPES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=384,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for weight in (p for n, p in model.named_parameters() if structure.role(n.removesuffix(".weight")) == "down"):
            weight.mul_(10.0)
    model.save_pretrained(place)
    toy_tokenizer("llama").save_pretrained(place)  # type: ignore[union-attr]
    loaded = load_model(ModelSettings(name=str(place), device="cpu", **more), "causal-lm")
    task = TaskSettings(kind="causal-lm", template="plain", max_length=64)
    targets = {"lora": "attention", "all-linear": "all-linear"}.get(adapter, "auto")
    kind = "bottleneck" if adapter == "bottleneck" else "lora"
    settings = AdapterSettings(kind=kind, rank=4, targets=targets)
    return TransformerLearner(loaded, task, settings, None, seed=1)


@pytest.mark.parametrize("name", SHAPES)
def test_the_last_feed_forward_part_is_computed_where_it_is_needed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = of_family(name, tmp_path)
    held = examples(learner)
    groups, params = [held[:2], held[2:3], held[3:]], bound(learner, 3)
    assert learner.head.narrow == SHAPES[name][2]
    monkeypatch.setattr(head.Head, "_narrows", lambda *_: False)
    whole = of_family(name, tmp_path)
    assert not whole.head.narrow
    if learner.head.narrow:
        part = learner.loaded.model.get_submodule(structure.last_feed_forward(learner.loaded.model) or "")
        sizes: list[int] = []
        down = [m for n, m in part.named_modules() if structure.role(n) == "down" or n.endswith("c_proj")]
        down[-1].register_forward_hook(lambda module, args, output: sizes.append(output.shape[:-1].numel()))
        slopes(learner, params, groups)
        assert sizes == [sum(example.targets for example in held)]
    (found, got), (wanted, right) = slopes(learner, params, groups), slopes(whole, params, groups)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert got.keys() == right.keys() and got
    for key in right:
        size = max(1.0, float(right[key].abs().max()))
        torch.testing.assert_close(got[key], right[key], rtol=1e-4, atol=1e-6 * size)
    with torch.no_grad(), learner.using(params), whole.using(params):
        for one, other in zip(learner.hidden(groups), whole.hidden(groups), strict=True):
            torch.testing.assert_close(one, other)


def test_it_is_computed_whole_where_it_is_trained_or_computed_twice(tmp_path: Path) -> None:
    assert of_family("qwen2", tmp_path).head.narrow
    assert not of_family("qwen2", tmp_path, "all-linear").head.narrow
    assert not of_family("qwen2", tmp_path, "bottleneck").head.narrow
    assert not of_family("qwen2", tmp_path, gradient_checkpointing=True).head.narrow


def test_the_trunk_is_itself_again_after_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    learner = make("llama", "lora", tmp_path)
    held, params = examples(learner), bound(learner, 1)
    whole, _ = slopes(learner, params, [held])
    monkeypatch.setattr(head, "STRETCH", 1000)
    layer: Any = learner.loaded.model.get_output_embeddings()

    def broken(module: object, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[:-1].numel() > 1:
            raise RuntimeError("no memory")

    handle = layer.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="no memory"):
        slopes(learner, params, [held])
    handle.remove()
    assert "forward" not in learner.loaded.model.model.__dict__
    torch.testing.assert_close(slopes(learner, params, [held])[0], whole, rtol=1e-5, atol=1e-6)


def test_a_head_that_is_trained_is_run_whole(tmp_path: Path) -> None:
    assert not make("llama", "full", tmp_path).head.stretched
    assert not make("gpt2", "full", tmp_path).head.stretched


def test_labels_are_not_chosen_where_there_is_no_language_model() -> None:
    labels = ["bad", "good"]
    loaded = toy_model("bert", kind="sequence-classification", labels=labels)
    task = TaskSettings(kind="sequence-classification", max_length=64)
    learner = TransformerLearner(loaded, task, AdapterSettings(rank=4), labels, seed=1)
    assert not learner.head.selective and not learner.head.stretched and not learner.notes
