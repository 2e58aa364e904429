"""Padding - a causal model gives the same numbers without a mask; one that looks ahead is told what is padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings
from fedllm.models.toy import toy_model, toy_tokenizer
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.padding import unseen
from fedllm.tasks.settings import TaskSettings

TEXTS = ("the film was great", "no", "every client trains it at home", "0 1 2 3 4")
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 384, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {}),
}


def make(family: str, place: Path, adapter: str = "lora") -> TransformerLearner:
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
    task = TaskSettings(kind="causal-lm", template="plain", max_length=64)
    return TransformerLearner(loaded, task, AdapterSettings(kind=adapter, rank=4, tokens=3), None, seed=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "adapter"),
    [("llama", "lora"), ("llama", "prompt"), ("llama", "prefix"), ("qwen", "lora"), ("gpt2", "lora"), ("opt", "lora"),
     ("bloom", "lora")],
)  # fmt: skip
def test_a_text_is_trained_as_if_it_were_alone(family: str, adapter: str, tmp_path: Path) -> None:
    learner = make(family, tmp_path, adapter)
    assert learner._unmasked
    draw = torch.Generator().manual_seed(0)
    params = {n: (t + 0.1 * torch.randn(t.shape, generator=draw))[None] for n, t in learner.initial().items()}
    held = learner.prepare([{"instruction": text, "response": text[::-1]} for text in TEXTS])
    assert len({example.tokens for example in held}) > 2, "they are padded"

    def found(groups: list[list[Any]]) -> torch.Tensor:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
        with learner.using(leaves):
            sums = [learner.losses([group]).sum() for group in groups]
            torch.stack(sums).sum().backward()
        return torch.cat([torch.stack(sums).sum().detach().view(1), *(t.grad.flatten() for t in leaves.values())])  # type: ignore[union-attr]

    alone = found([[example] for example in held])
    torch.testing.assert_close(found([held]), alone, rtol=1e-4, atol=1e-5 * max(1.0, float(alone.abs().max())))
    learner._unmasked = False
    torch.testing.assert_close(found([held]), alone, rtol=1e-4, atol=1e-5 * max(1.0, float(alone.abs().max())))


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
