"""Continuations are those of transformers, whatever is bound and whoever shares the pass."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from fedllm.core.errors import ModelError
from fedllm.core.tensors import Tensors
from fedllm.models.adapters.attach import Adapted
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.toy import toy_model
from fedllm.tasks.decode import _Picker, continue_prompts
from fedllm.tasks.template import Template

PROMPTS = ("the film", "no", "every client trains it at home, and the server adds up", "0 1 2 3 4 🙂", "a")
FAMILIES = ["llama", "gpt2", "qwen", "t5"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def put(family: str, kind: str = "lora", **options: Any) -> Adapted:
    task = "seq2seq" if family == "t5" else "causal-lm"
    options = {"targets": "all-linear" if kind == "lora" else "auto", **options}
    settings = AdapterSettings(kind=kind, rank=4, tokens=3, **options)  # type: ignore[arg-type]
    return Adapted(toy_model(family, kind=task), settings, seed=1)  # type: ignore[arg-type]


def shaken(params: Tensors, seed: int = 0, size: float = 0.2) -> Tensors:
    stream = torch.Generator().manual_seed(seed)
    return {name: t + size * torch.randn(t.shape, generator=stream) for name, t in params.items()}


def written(
    adapted: Adapted, trees: Sequence[Tensors] | None, prompts: Sequence[Sequence[str]], count: int = 8,
    temperature: float = 0.0, seeds: Sequence[int] = (0,),
) -> list[list[str]]:  # fmt: skip
    bound = None if trees is None else {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}
    with adapted.using(bound):
        return continue_prompts(adapted, prompts, count, temperature, seeds)


def generated(adapted: Adapted, model: Any, prompts: Sequence[str], count: int = 8, **options: Any) -> list[str]:
    """transformers' own greedy decoding of left-padded prompts."""
    tokenizer = adapted.loaded.tokenizer
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")  # type: ignore[misc]
    found = model.generate(**batch, max_new_tokens=count, do_sample=False, use_cache=True, **options)
    new = found if adapted.loaded.kind == "seq2seq" else found[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)  # type: ignore[union-attr]


def merged(adapted: Adapted, tree: Tensors) -> Any:
    """A copy of the base with the LoRA pairs added to its weights, and no hooks."""
    plain = copy.deepcopy(adapted.model)
    for module in plain.modules():
        module._forward_hooks.clear()
    with torch.no_grad():
        for name in (n.removesuffix(".lora_A") for n in tree if n.endswith("lora_A")):
            weight = plain.get_parameter(f"{name}.weight")
            change = 16 / 4 * tree[f"{name}.lora_B"] @ tree[f"{name}.lora_A"]
            weight += change.T if type(plain.get_submodule(name)).__name__ == "Conv1D" else change
    return plain


@functools.cache
def ready(family: str) -> tuple[Adapted, Tensors]:
    adapted = put(family)
    return adapted, shaken(adapted.initial())


# --- greedy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_on_the_base_model(family: str):
    adapted, _ = ready(family)
    assert written(adapted, None, [PROMPTS]) == [generated(adapted, merged(adapted, {}), PROMPTS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_with_lora_equals_transformers_on_the_merged_model(family: str):
    adapted, tree = ready(family)
    found = written(adapted, [tree], [PROMPTS], 12)
    assert found == [generated(adapted, merged(adapted, tree), PROMPTS, 12)]
    assert found != written(adapted, None, [PROMPTS], 12) and len(set(found[0])) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_clients_with_more_and_fewer_prompts_get_what_each_gets_alone(family: str):
    adapted, tree = ready(family)
    trees = [tree, shaken(adapted.initial(), 5), tree, tree]
    prompts = [PROMPTS[:1], PROMPTS[1:4], (), PROMPTS[4:]]
    found = written(adapted, trees, prompts, seeds=(0, 1, 2, 3))
    assert found[2] == []
    for k in (0, 1, 3):
        assert found[k] == written(adapted, [trees[k]], [prompts[k]])[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen"])
def test_a_prompt_of_any_length_is_continued_as_alone(family: str):
    adapted, tree = ready(family)
    alone = [written(adapted, [tree], [[prompt]])[0][0] for prompt in PROMPTS]
    assert written(adapted, [tree], [PROMPTS]) == [alone]


@pytest.mark.parametrize("kind", ["prompt", "prefix", "ia3", "bottleneck", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen"])
def test_the_cache_gives_what_a_full_pass_per_token_gives(family: str, kind: str):
    adapted = put(family, kind)
    tree = shaken(adapted.initial(), size={"full": 0.05, "bottleneck": 0.05}.get(kind, 0.5))
    found = written(adapted, [tree], [PROMPTS], 6)[0]
    tokenizer = adapted.loaded.tokenizer
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = tokenizer(prompt)["input_ids"]  # type: ignore[misc]
        begin = len(ids)
        for _ in range(6):
            batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            with torch.no_grad(), adapted.using({name: t.unsqueeze(0) for name, t in tree.items()}):
                ids = [*ids, int(adapted.call(batch).logits[0, -1].argmax())]
            if ids[-1] == tokenizer.eos_token_id:  # type: ignore[union-attr]
                break
        assert text == tokenizer.decode(ids[begin:], skip_special_tokens=True)  # type: ignore[union-attr]
    assert len(set(found)) > 1


def test_writing_stops_at_every_end_token_of_the_generation_settings():
    adapted, tree = ready("llama")
    plain, tokenizer = merged(adapted, tree), adapted.loaded.tokenizer
    prompt = tokenizer(PROMPTS[:1], return_tensors="pt")  # type: ignore[misc]
    tokens = plain.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    place = next(place for place in range(2, 12) if tokens[place] not in tokens[:place])
    settings = adapted.model.generation_config
    before, settings.eos_token_id = settings.eos_token_id, [settings.eos_token_id, tokens[place]]  # type: ignore[union-attr]
    try:
        found = written(adapted, [tree], [PROMPTS[:1]], 12)[0][0]
    finally:
        settings.eos_token_id = before  # type: ignore[union-attr]
    assert found == tokenizer.decode(tokens[:place])  # type: ignore[union-attr]


def test_writing_stops_at_the_end_of_a_chat_turn():
    adapted, tree = ready("llama")
    tokenizer: Any = adapted.loaded.tokenizer
    plain = merged(adapted, tree)
    prompt = tokenizer(PROMPTS[:1], return_tensors="pt")
    tokens = plain.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    place = next(place for place in range(2, 12) if tokens[place] not in tokens[:place])
    template = Template("plain", tokenizer)
    template.turn_end = tokens[place]
    with adapted.using({name: tensor.unsqueeze(0) for name, tensor in tree.items()}):
        found = continue_prompts(adapted, [PROMPTS[:1]], 12, 0.0, [0], template)[0][0]
    assert found == tokenizer.decode(tokens[:place])


def test_the_start_and_end_tokens_of_a_prompt():
    adapted, tree = ready("llama")
    (plain,) = written(adapted, [tree], [["the film"]])
    (with_start,) = written(adapted, [tree], [["<s>the film"]])
    assert plain == with_start, "a chat template may have written the start token already"
    ending, tree = ready("gpt2")
    tokenizer = ending.loaded.tokenizer
    assert written(ending, [tree], [["the film<end>"]]) == written(ending, [tree], [["the film"]])
    assert tokenizer("")["input_ids"] == []  # type: ignore[misc]
    (empty, start) = written(ending, [tree], [["", "<start>"]])[0]
    assert empty == start


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_new_tokens_is_bounded(family: str):
    adapted, tree = ready(family)
    longest = written(adapted, [tree], [PROMPTS], 12)[0]
    for count in (0, 1, 5):
        for text, longer in zip(written(adapted, [tree], [PROMPTS], count)[0], longest, strict=True):
            assert longer.startswith(text.rstrip("\ufffd"))
    assert written(adapted, [tree], [PROMPTS], 0) == [[""] * len(PROMPTS)]


# --- sampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_sample_depends_on_its_clients_seed_and_nothing_else(family: str):
    adapted, tree = ready(family)
    other = shaken(adapted.initial(), 5)
    found = written(adapted, [tree, other, tree], [PROMPTS[:2], PROMPTS[:4], PROMPTS[:2]], 8, 1.0, (11, 12, 13))
    assert found == written(adapted, [tree, other, tree], [PROMPTS[:2], PROMPTS[:4], PROMPTS[:2]], 8, 1.0, (11, 12, 13))
    assert found[0] == written(adapted, [tree], [PROMPTS[:2]], 8, 1.0, (11,))[0]
    assert found[0] != found[2], "another seed"
    assert found[1][:1] == written(adapted, [other], [PROMPTS[:1]], 8, 1.0, (12,))[0], "its other prompts"
    twice = written(adapted, [tree], [PROMPTS[:1] * 2], 8, 1.0, (11,))[0]
    assert twice[0] != twice[1], "each prompt has a stream of its own"


def test_a_low_temperature_is_greedy_and_the_global_stream_is_left_alone():
    adapted, tree = ready("llama")
    state = torch.get_rng_state()
    assert written(adapted, [tree], [PROMPTS], 8, 1e-4, (3,)) == written(adapted, [tree], [PROMPTS], 8)
    written(adapted, [tree], [PROMPTS], 8, 1.0, (3,))
    assert torch.equal(state, torch.get_rng_state())


def test_tokens_are_drawn_as_often_as_the_softmax_says():
    rows = 4000
    picker = _Picker(2.0, [torch.Generator().manual_seed(row) for row in range(rows)])
    chances = torch.tensor([0.1, 0.6, 0.3])
    drawn = picker((2.0 * chances.log()).expand(rows, 3))
    assert torch.allclose(torch.bincount(drawn) / rows, chances, atol=0.03)


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_classifier_writes_no_text():
    adapted = Adapted(toy_model("bert", kind="sequence-classification"), AdapterSettings(), 0)
    with pytest.raises(ModelError, match="cannot write text"):
        written(adapted, None, [["x"]])
    assert written(put("llama"), None, [[], []], seeds=(0, 1)) == [[], []]


@pytest.mark.parametrize(("kind", "room"), [("lora", 256), ("prompt", 253), ("prefix", 253)])
def test_more_tokens_than_the_model_reads_are_refused(kind: str, room: int):
    adapted = put("gpt2", kind)
    prompt = "0" * 200
    length = len(adapted.loaded.tokenizer(prompt)["input_ids"])  # type: ignore[misc]
    written(adapted, [adapted.initial()], [[prompt]], room - length)
    with pytest.raises(ModelError, match=f"reads {room} tokens at most"):
        written(adapted, [adapted.initial()], [[prompt, "a"]], room - length + 1)
    with pytest.raises(ModelError, match="no room"):
        written(Adapted(toy_model("gpt2"), AdapterSettings(kind="prompt", tokens=256), 0), None, [["a"]])
