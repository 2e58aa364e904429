"""Sight - a text is trained as if it were alone: beside padding without a mask, and beside other texts of its block."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError, ModelError
from fedllm.core.tensors import Tensors
from fedllm.core.work import Example
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings
from fedllm.models.toy import toy_model, toy_tokenizer
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings
from fedllm.tasks.sight import unseen

TEXTS = ("the film was great", "no", "every client trains it at home", "0 1 2 3 4")
ROWS = [{"instruction": text, "response": text[::-1]} for text in TEXTS]
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 384, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {}),
}


def make(family: str, place: Path, adapter: str = "lora", **task: Any) -> TransformerLearner:
    if family in OTHERS:
        import transformers

        config, model, options = OTHERS[family]
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**SIZES, **options))
        made.save_pretrained(place)
        toy_tokenizer("llama").save_pretrained(place)  # type: ignore[union-attr]
        loaded = load_model(ModelSettings(name=str(place), device="cpu"), "causal-lm")
    else:
        loaded = toy_model(family)
    chosen = TaskSettings(kind="causal-lm", template="plain", max_length=120, **task)
    return TransformerLearner(loaded, chosen, AdapterSettings(kind=adapter, rank=4, tokens=3), None, seed=1)  # type: ignore[arg-type]


def moved(learner: TransformerLearner) -> Tensors:
    """The adapter of one client, moved at random."""
    draw = torch.Generator().manual_seed(0)
    return {n: (t + 0.1 * torch.randn(t.shape, generator=draw))[None] for n, t in learner.initial().items()}


def trained(learner: TransformerLearner, params: Tensors, groups: list[list[Example]]) -> torch.Tensor:
    """The sum of the losses and its slopes, flat; each group in a pass of its own."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
    with learner.using(leaves):
        total = torch.stack([learner.losses([group]).sum() for group in groups]).sum()
        slopes = torch.autograd.grad(total, list(leaves.values()))
    return torch.cat([total.detach().view(1), *(slope.flatten() for slope in slopes)])


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize(
    ("family", "adapter"),
    [("llama", "lora"), ("llama", "prompt"), ("llama", "prefix"), ("qwen", "lora"), ("gpt2", "lora"), ("opt", "lora"),
     ("bloom", "lora")],
)  # fmt: skip
def test_a_text_is_trained_as_if_it_were_alone(family: str, adapter: str, tmp_path: Path) -> None:
    learner = make(family, tmp_path, adapter)
    assert learner._unmasked
    params = moved(learner)
    held = learner.prepare(ROWS)
    assert len({example.tokens for example in held}) > 2, "they are padded"

    alone = trained(learner, params, [[example] for example in held])
    near(trained(learner, params, [held]), alone)
    learner._unmasked = False
    near(trained(learner, params, [held]), alone)


@pytest.mark.parametrize(
    ("family", "adapter"), [("llama", "lora"), ("llama", "ia3"), ("qwen", "lora"), ("gpt2", "lora")]
)
def test_a_packed_text_is_trained_as_if_it_were_alone(family: str, adapter: str, tmp_path: Path) -> None:
    plain, learner = make(family, tmp_path, adapter), make(family, tmp_path, adapter, pack=True)
    params = moved(plain)
    texts, blocks = plain.prepare(ROWS), learner.prepare(ROWS)
    assert 1 < len(blocks) < len(texts) and len({block.tokens for block in blocks}) > 1, "the last one is padded"
    alone = trained(plain, params, [[text] for text in texts])
    near(trained(learner, params, [blocks]), alone)
    near(trained(learner, params, [[block] for block in blocks]), alone)
    joined = trained(
        plain, params, [[replace(block, inputs={"input_ids": block.inputs["input_ids"]})] for block in blocks]
    )
    assert float((joined - alone).abs().max()) > 1e-2, "texts that see each other are another thing"


def test_no_text_predicts_the_first_token_of_the_next(tmp_path: Path) -> None:
    """Where a tokenizer puts nothing in front of a text, its first token has a label that nothing may predict."""
    plain, learner = make("qwen", tmp_path), make("qwen", tmp_path, pack=True)
    rows = [{"text": text} for text in TEXTS]
    texts, blocks = plain.prepare(rows), learner.prepare(rows)
    assert all(int(text.labels[0]) >= 0 for text in texts) and len(blocks) < len(texts)
    assert sum(block.targets for block in blocks) == sum(int((block.labels >= 0).sum()) for block in blocks)
    params = moved(plain)
    near(trained(learner, params, [blocks]), trained(plain, params, [[text] for text in texts]))


@pytest.mark.parametrize("adapter", ["prompt", "prefix"])
def test_packing_is_refused_where_something_stands_in_front(adapter: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"task\.pack=true with adapter\.kind=.*seen by its first text alone"):
        make("llama", tmp_path, adapter, pack=True)


def test_packing_is_refused_where_texts_cannot_be_kept_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not keep the texts of a block apart.*task\.pack=stream"):
        make("bloom", tmp_path, pack=True)
    assert make("bloom", tmp_path, pack="stream")


@pytest.mark.parametrize("pack", [True, "stream"])
def test_no_text_is_written_for_blocks(pack: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.generate=4 and task\.pack=.*a block has several"):
        make("llama", tmp_path, pack=pack, generate=4)


def test_a_split_model_takes_no_packed_texts(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"task\.pack=true: what tells the texts"):
        make("llama", tmp_path, pack=True).split(1, None)


def test_hidden_states_of_packed_texts_are_those_of_each(tmp_path: Path) -> None:
    plain, learner = make("llama", tmp_path), make("llama", tmp_path, pack=True)
    params = moved(plain)
    texts, blocks = plain.prepare(ROWS), learner.prepare(ROWS)
    with torch.no_grad(), plain.using(params), learner.using(params):
        last = learner.hidden([blocks])[-1]
        parts = [own[:1] for text in texts for own in [plain.hidden([[text]])[-1]]]
    found = []
    for states, block in zip(last, blocks, strict=True):
        starts = [*torch.nonzero(block.inputs["position_ids"] == 0).flatten().tolist(), block.tokens]
        found += [states[a:b] for a, b in itertools.pairwise(starts)]
    for part in parts:
        assert any(own.shape == part[0].shape and torch.allclose(own, part[0], rtol=1e-4, atol=1e-5) for own in found)


def test_a_model_that_looks_ahead_must_be_told_what_is_padding() -> None:
    task = TaskSettings(kind="masked-lm", max_length=64)
    learner = TransformerLearner(toy_model("bert", kind="masked-lm"), task, AdapterSettings(rank=4), None, seed=1)
    assert not learner._unmasked and not unseen(learner.adapted, 384, learner.tokenizer.pad_token_id)


def test_no_mask_is_built_for_a_causal_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make("llama", tmp_path)
    held = learner.prepare([{"instruction": text, "response": "yes"} for text in TEXTS])
    masks: list[Any] = []
    true = torch.nn.functional.scaled_dot_product_attention

    def seen(*args: Any, **options: Any) -> torch.Tensor:
        masks.append(options.get("attn_mask"))
        return true(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    with torch.no_grad(), learner.using({n: t[None] for n, t in learner.initial().items()}):
        learner.losses([held])
        assert masks and all(mask is None for mask in masks)
        learner._unmasked = False
        learner.losses([held])
    assert masks[-1] is not None
